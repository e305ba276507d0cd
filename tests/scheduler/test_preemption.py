"""Many long answers and memory for one and a half: everyone yields, and everyone gets through."""

import numpy as np
import pytest

from millrace.perf.sim.runner import FakeRunner
from millrace.perf.sim.scenario import policy_of
from millrace.perf.sim.script import Script, expected
from millrace.scheduler.admission import Accepted
from millrace.scheduler.invariants import check
from millrace.scheduler.policy import MAX_YIELDS
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits, Scheduler

REQUESTS, PROMPT, OUTPUT, BLOCK = 16, 6, 30, 2
LONGEST = -(-(PROMPT + OUTPUT) // BLOCK)  # blocks


def crowd(caching: bool) -> list[Request]:
    """All differ in tenant, class and deadline, so that every policy has something to choose."""
    return [
        Request(
            id=index,
            prompt=np.arange(PROMPT, dtype=np.int32) + index,
            max_tokens=OUTPUT,
            payload=Script(seed=index),
            priority=index % 3,
            tenant=f"tenant {index % 4}",
            deadline_s=1e9 - index if index % 2 else None,
            read_cache=caching,
        )
        for index in range(REQUESTS)
    ]


@pytest.mark.parametrize("caching", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("policy", ["first_come", "priority", "fair_share", "deadline"])
def test_everyone_gets_through_a_cache_that_is_much_too_small(policy, caching):
    limits = Limits(
        num_blocks=LONGEST * 3 // 2,
        block_size=BLOCK,
        max_running=8,
        max_step_tokens=16,
        max_waiting=REQUESTS,
        max_waiting_tokens=10_000,
        prefix_caching=caching,
    )
    scheduler, runner = Scheduler(limits, policy_of(policy, limits)), FakeRunner(limits)
    requests = crowd(caching)
    for arriving in requests:
        assert scheduler.submit(arriving) == Accepted()
    computed = 0
    while (plan := scheduler.schedule(float(computed))) is not None:
        result = runner.execute(plan)
        runner.land(plan.step)
        scheduler.apply(result)
        computed += plan.num_tokens
    check(scheduler)
    assert [request.outputs for request in requests] == [expected(r)[0] for r in requests]
    assert scheduler.counters.preemptions > REQUESTS
    # Only where all that run have yielded so often must one of them yield once more.
    assert max(request.num_preemptions for request in requests) <= 2 * MAX_YIELDS
    assert computed < 4 * REQUESTS * (PROMPT + OUTPUT)


@pytest.mark.parametrize("policy", ["first_come", "priority", "deadline"])
def test_who_has_yielded_three_times_goes_on_while_others_can_yield(policy):
    limits = Limits(8, 2, 8, 16, 8, 100)
    order = policy_of(policy, limits)
    requests = crowd(caching=True)[:3]
    for arrival, request in enumerate(requests):
        request.arrival, request.deadline_s, request.priority = arrival, 100.0, 0
    assert order.victim(requests) is requests[2]
    requests[2].num_preemptions = MAX_YIELDS
    assert order.victim(requests) is requests[1]
    requests[0].num_preemptions = requests[1].num_preemptions = MAX_YIELDS
    assert order.victim(requests) is requests[2], "all have yielded as often: the last yields"
