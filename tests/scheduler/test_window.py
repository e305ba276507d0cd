"""Blocks of a request behind the window: how many it holds, and what stays cached."""

import numpy as np
import pytest

from millrace.perf.sim.runner import FakeRunner
from millrace.perf.sim.script import Script, expected
from millrace.scheduler.admission import Accepted, Refused
from millrace.scheduler.invariants import check
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits, Scheduler
from millrace.scheduler.window import Window

BLOCK, WINDOW = 4, 10


def make_scheduler(num_blocks: int, **changes) -> tuple[Scheduler, FakeRunner]:
    limits = Limits(
        num_blocks,
        block_size=BLOCK,
        max_running=4,
        max_waiting=8,
        max_waiting_tokens=1000,
        max_context=200,
        **{"max_step_tokens": 8, "window": WINDOW} | changes,
    )
    return Scheduler(limits), FakeRunner(limits)


def make_request(request_id: int, prompt: int, max_tokens: int) -> Request:
    tokens = np.arange(prompt, dtype=np.int32)
    return Request(request_id, tokens, max_tokens, payload=Script(seed=request_id))


def run(scheduler: Scheduler, runner: FakeRunner, *requests: Request) -> int:
    """To the end; returns the most blocks that were referenced at once."""
    most = 0
    for request in requests:
        assert scheduler.submit(request) == Accepted()
    while (plan := scheduler.schedule()) is not None:
        result = runner.execute(plan)
        check(scheduler)
        most = max(most, scheduler.pool.num_referenced)
        runner.land(plan.step)
        scheduler.apply(result)
    for request in requests:
        assert request.outputs == expected(request)[0]
    return most


def test_a_long_answer_holds_no_more_than_its_beginning_and_the_window():
    scheduler, runner = make_scheduler(num_blocks=40)
    window = scheduler.limits.sliding
    assert window is not None and window.indexed == 3
    assert run(scheduler, runner, make_request(0, prompt=5, max_tokens=150)) <= 3 + 4
    assert scheduler.pool.num_referenced == 0


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_and_an_answer_longer_than_the_pool_run_to_their_end(caching):
    scheduler, runner = make_scheduler(num_blocks=5, prefix_caching=caching)
    run(scheduler, runner, *(make_request(i, prompt=90 + i, max_tokens=50) for i in range(3)))
    assert scheduler.pool.num_blocks * BLOCK < 90


def test_a_pool_smaller_than_the_window_bounds_the_request():
    scheduler, _ = make_scheduler(num_blocks=3)
    assert scheduler.limits.sliding is None
    assert scheduler.submit(make_request(0, prompt=13, max_tokens=1)) != Accepted()
    assert isinstance(scheduler.submit(make_request(1, prompt=12, max_tokens=2)), Refused)


def test_a_prompt_stays_cached_as_far_as_the_first_window():
    scheduler, runner = make_scheduler(num_blocks=40)
    run(scheduler, runner, make_request(0, prompt=60, max_tokens=1))
    run(scheduler, runner, again := make_request(1, prompt=60, max_tokens=1))
    assert again.cached_tokens == 3 * BLOCK


@pytest.mark.parametrize(("window", "needed"), [(1, 7), (2, 6), (5, 6), (6, 5), (29, 0), (99, 0)])
def test_the_first_block_needed_is_that_of_the_first_position_seen(window, needed):
    rule = Window.make(window, BLOCK, num_blocks=100, max_step_tokens=8)
    assert rule is not None and rule.first_needed(28) == needed
