"""What the simulated worlds are made of: traffic, sessions, the device's time and the clock."""

import dataclasses
import math
import statistics
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from millrace.perf.sim.clock import Clock
from millrace.perf.sim.crowd import Crowd
from millrace.perf.sim.device import Device, Roughness
from millrace.perf.sim.load import Load, LoadCounter
from millrace.perf.sim.patience import Patience
from millrace.perf.sim.scenario import draw_scenario
from millrace.perf.sim.script import expected
from millrace.perf.sim.traffic import TRACES, Lengths, gap_s
from millrace.scheduler.admission import Accepted, Admission
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler

# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize("cv", [1.0, 1.08, 2.09])
def test_gaps_have_their_mean_and_their_spread(cv):
    rng = Random(1)
    gaps = [gap_s(rng, 2.0, cv) for _ in range(20_000)]
    assert statistics.fmean(gaps) == pytest.approx(2.0, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_lengths_follow_the_trace_and_keep_their_limit():
    rng, lengths = Random(1), TRACES["azure-conversation"].prompt
    drawn = [lengths.draw(rng, limit=100_000) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(math.exp(6.63), rel=0.05)
    assert statistics.fmean(drawn) == pytest.approx(lengths.mean, rel=0.05)
    small = [lengths.draw(rng, limit=30, scale=0.01) for _ in range(1000)]
    assert min(small) >= 1
    assert max(small) == 30
    assert Lengths.fixed(512).draw(rng, limit=1000) == 512


# ---------------------------------------------------------------- time


def test_a_device_runs_one_step_after_the_other():
    device = Device(lambda load: 2.0, Random(0))
    device.launch(A_STEP, 10.0)
    device.launch(A_STEP, 11.0)  # while the first runs
    assert (device.land(), device.land()) == (12.0, 14.0)
    device.launch(A_STEP, 20.0)
    device.lose()
    device.launch(A_STEP, 20.5)
    assert device.land() == 22.5


def test_a_rough_device_strays_and_stalls():
    device = Device(lambda load: 1.0, Random(0), Roughness(sigma=0.1, stall=0.1, stall_factor=50))
    times = [device.launch(A_STEP, 0.0) for _ in range(1000)]
    assert statistics.median(times) == pytest.approx(1.0, rel=0.05)
    assert 50 <= sum(seconds > 25.0 for seconds in times) <= 150


def test_the_clock_jumps_both_ways_stands_still_and_stays_above_zero():
    clock, told = Clock(Random(0), jump=0.2), []
    for turn in range(500):
        clock.wait_until(1000.0 + turn)
        clock.tick()
        told.append(clock.told_s)
    steps = [after - before for before, after in pairwise(told)]
    assert max(steps) > 60.0
    assert min(steps) < -60.0
    assert 0.0 in steps
    assert min(told) > 0.0


def test_a_clock_that_goes_back_makes_nobody_seem_fast():
    """The drain rate would turn negative, and a full queue would look empty."""
    admission = Admission(10, 1000, max_wait_s=5.0)
    for now_s in (100.0, 50.0, 20.0, 10.0):
        admission.ended(now_s, waiting=5)
    assert admission.expected_wait_s(5) >= 0.0


# ---------------------------------------------------------------- load


A_STEP = Load(0, 1, 1, 10, 0, 0)


def test_loads_count_the_context_that_decodes_read():
    counter = LoadCounter(max_running=4)
    chunks = [PrefillChunk(2, 0, 16, False), PrefillChunk(1, 5, 3, True)]
    first = counter.count(StepPlan(1, prefill=chunks))
    assert first == Load(19, 0, 1, 0, 16 + 8, 16 * 17 // 2 + (6 + 7 + 8))
    rest = [PrefillChunk(2, 16, 4, True)]
    second = counter.count(StepPlan(2, prefill=rest, decode_joins=[1], num_decodes=1))
    assert (second.decodes, second.samples, second.context_tokens) == (1, 2, 9)
    third = counter.count(StepPlan(3, decode_joins=[2], num_decodes=2))
    assert third == Load(0, 2, 2, 10 + 21, 0, 0)
    assert counter.decoding().tolist() == [1, 2]
    last = counter.count(StepPlan(4, decode_leaves=[1], num_decodes=1))
    assert last.context_tokens == 22


@pytest.mark.parametrize("width", [1, 3, 8, 100])
def test_a_window_bounds_what_is_read_and_paired(width):
    """Position by position: it sees itself and the `width` - 1 before it."""
    counter, chunks = LoadCounter(4, [width]), [(0, 5), (5, 12), (17, 1)]
    for start, length in chunks:
        plan = StepPlan(1, prefill=[PrefillChunk(0, start, length, False)])
        (found,) = counter.count(plan).windowed
        seen = [range(max(0, p - width + 1), p + 1) for p in range(start, start + length)]
        assert found.prefill_pairs == sum(map(len, seen))
        assert found.prefill_context_tokens == len(set().union(*seen))
    counter.count(StepPlan(2, prefill=[PrefillChunk(1, 0, 2, True)]))
    load = counter.count(StepPlan(3, decode_joins=[0, 1], num_decodes=2))
    assert load.context_tokens == 19 + 3
    assert load.windowed[0].context_tokens == min(19, width) + min(3, width)


def test_swapped_blocks_are_counted_both_ways():
    plan = StepPlan(1, swap_outs=[(4, 0), (5, 1)], swap_ins=[(2, 7)])
    assert LoadCounter(4).count(plan).swapped_blocks == 3


# ---------------------------------------------------------------- sessions


def a_session_world(seed: int) -> Crowd:
    scenario = draw_scenario(Random(seed), 40)
    return Crowd(
        Random(seed),
        dataclasses.replace(
            scenario,
            session=1.0,
            num_requests=40,
            max_prompt=400,
            deadline=0.0,
            failure=0.0,
            lookahead=0.0,
        ),
    )


def test_a_session_goes_on_from_its_answer_and_finds_it_in_the_cache():
    """Each request alone, with memory to spare: all whole blocks hit, but for the last token."""
    block_size, num_next = 4, 0
    crowd = a_session_world(3)
    scheduler = Scheduler(Limits(4000, block_size, 1, 500, 10, 10_000))
    over: list[tuple[str, list[int]]] = []
    while (request := crowd.come(crowd.next_s, 1.0)) is not None:
        request.leader, request.read_cache = None, True
        tokens = request.prompt.tolist()
        turns = [t for tenant, t in over if tenant == request.tenant and tokens[: len(t)] == t]
        serve_alone(scheduler, request)
        if turns:
            least = (min(len(max(turns, key=len)), len(tokens)) - 1) // block_size * block_size
            assert request.cached_tokens >= least
            num_next += 1
        over.append((request.tenant, tokens + request.outputs))
        crowd.ended(request, 0.0)
    assert num_next >= 5
    assert crowd.num_next_turns >= 5
    assert crowd.num_arrived == 40


def serve_alone(scheduler: Scheduler, request: Request) -> None:
    """To its end, with the tokens of its script."""
    assert isinstance(scheduler.submit(request), Accepted)
    tokens, _ = expected(request)
    while (plan := scheduler.schedule(1.0)) is not None:
        draws = plan.num_decodes + sum(chunk.samples for chunk in plan.prefill)
        index = len(scheduler._slots.tokens(request.slot)) - len(request.prompt)
        row = np.full(draws, request.slot, np.int64)
        is_last = np.full(draws, index == len(tokens) - 1)
        token = np.full(draws, tokens[index], np.int64)
        scheduler.apply(StepResult(plan.step, row, token, is_last, np.ones(draws, np.bool_)), 1.0)
    assert request.finish in (Finish.LENGTH, Finish.STOP)


# ---------------------------------------------------------------- bounds


def a_request(request_id: int) -> Request:
    return Request(request_id, np.zeros(1, np.int32), max_tokens=1)


def test_whoever_lives_past_the_bound_is_noticed_though_it_never_ends():
    patience = Patience(longest=2, may_overtake=False)
    patience.accepted(a_request(0), num_live=1)
    with pytest.raises(AssertionError, match="request 0 lives"):
        for _ in range(10_000):
            patience.next_turn()


def test_those_that_may_overtake_lend_patience():
    turns = {}
    for may_overtake in (False, True):
        patience = Patience(longest=2, may_overtake=may_overtake)
        for index in range(10):
            patience.accepted(a_request(index), num_live=1)
        with pytest.raises(AssertionError):
            while True:
                patience.next_turn()
        turns[may_overtake] = patience.turn
    assert turns[True] > turns[False]
