"""The picture in docs/scheduling.md shows what the scheduler does now, not what it once did."""

from pathlib import Path

from millrace.perf.sim.timeline import ORANGE, POLICIES, draw, simulate
from millrace.scheduler.request import Finish

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "scheduling.svg"


def test_the_committed_picture_is_drawn_from_this_scheduler():
    """After a change of plan: python -m millrace.perf.sim.timeline docs/scheduling.svg"""
    assert draw([simulate(policy) for policy in POLICIES]) == PICTURE.read_text()


def first_tokens_s(policy: str) -> list[float]:
    """Of the small tenant's requests, from arrival."""
    rows = [row for row in simulate(policy).rows if row.colour == ORANGE]
    return [row.prefilled_s - row.request.arrived_s for row in rows if row.prefilled_s is not None]


def test_a_small_tenant_waits_for_a_greedy_one_only_where_order_is_by_arrival():
    assert min(first_tokens_s("first_come")) > 2.0
    for policy in ("priority", "fair_share", "deadline"):
        assert max(first_tokens_s(policy)) < 1.5


def test_what_cannot_make_its_deadline_is_shed_and_all_else_is_served():
    ends = [row.request.finish for row in simulate("deadline").rows]
    assert ends.count(Finish.DEADLINE) == 1
    assert ends.count(Finish.LENGTH) == len(ends) - 1
