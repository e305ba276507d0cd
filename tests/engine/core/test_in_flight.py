"""What must not happen to a slot, a block or a stream while launched steps are still in flight.

tests/engine/core/test_run_ahead.py compares streams; here the books are looked into at every step.
"""

from collections import deque

import numpy as np
import pytest
import torch

from millrace.engine.core import loop
from millrace.engine.core.messages import Cancel, FlushCache
from millrace.scheduler.invariants import check

BLOCK_BYTES = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
AHEAD = pytest.mark.parametrize("run_ahead", [1, 2])


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 199, length).tolist()


class Fence:
    """Knows what each launched step holds, and at each launch and result that nothing is gone."""

    def __init__(self, world):
        self.runner, self.scheduler = world.core._runner, world.core.scheduler
        self.in_flight = deque()  # of each launched step: its number, [(slot, request, blocks)]
        self.most = self.ended_in_flight = 0
        self.execute, self.apply = self.runner.execute, self.scheduler.apply
        self.runner.execute, self.scheduler.apply = self.launch, self.take

    def launch(self, plan):
        self.hold()
        launched = self.execute(plan)
        slots = {*self.runner._decode_slots.tolist(), *(chunk.slot for chunk in plan.prefill)}
        requests = [(slot, self.scheduler.request_at(slot)) for slot in slots]
        held = [(slot, r, self.scheduler.blocks_of(r).copy()) for slot, r in requests]
        self.in_flight.append((plan.step, held))
        self.most = max(self.most, len(self.in_flight))
        return launched

    def take(self, result, now_s):
        self.hold()
        step, _ = self.in_flight.popleft()
        assert step == result.step, "results are taken in the order of the launches"
        return self.apply(result, now_s)

    def hold(self):
        for _, held in self.in_flight:
            for slot, request, blocks in held:
                assert self.scheduler._slots.requests[slot] is request, "its slot was given away"
                assert (self.scheduler.pool.refs[blocks] > 0).all(), "its blocks were given away"
                self.ended_in_flight += request.is_closing


@AHEAD
@pytest.mark.parametrize("num_blocks", [40, 4], ids=["room", "preemption"])
def test_nothing_that_a_launched_step_touches_changes_hands(make_world, run_ahead, num_blocks):
    """Stops, ends, cancels in the prompt and behind it, flushes, preemptions; slots come round."""
    world = make_world(
        **{"run_ahead": run_ahead, "max_running": 3, "max_step_tokens": 16},
        kv_cache_memory=num_blocks * BLOCK_BYTES,
    )
    fence = Fence(world)
    for index in range(14):
        stops = list(range(3, 43)) if index % 3 == 0 else []  # one of these comes before long
        prompt = prompt_of(6 + 7 * (index % 4), index)
        world.submit(index, prompt, 4 + index, stop_token_ids=stops, ignore_eos=True)
        world.step()
        world.step()
        if index % 4 == 1:
            world.core.handle(Cancel([index, index - 1]))
        if index % 5 == 2:
            world.core.handle(FlushCache(index))
    world.run()
    assert all(len(got.finish) == 1 for got in world.got.values()) and len(world.got) == 14
    assert fence.most == run_ahead + 1 and fence.ended_in_flight > 0
    assert (sum(stats.preemptions for stats in world.stats) > 0) == (num_blocks == 4)
    assert world.core.scheduler.pool.num_referenced == 0
    check(world.core.scheduler)


class Clock:
    now_s = 1000.0

    def monotonic(self):
        return self.now_s


@AHEAD
def test_a_deadline_in_flight_ends_one_stream_and_moves_no_other(
    make_world, monkeypatch, run_ahead
):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    alone = make_world(max_running=2)
    alone.submit(0, prompt_of(20), max_tokens=24, ignore_eos=True)
    expected = alone.run()[0].token_ids
    world = make_world(run_ahead=run_ahead, max_running=2)
    world.submit(0, prompt_of(20), max_tokens=24, ignore_eos=True)
    world.submit(1, prompt_of(21, 1), max_tokens=99, ignore_eos=True, deadline_s=1001.0)
    world.submit(2, prompt_of(22, 2), max_tokens=4, ignore_eos=True)  # waits for its slot
    for _ in range(8):
        world.step()
    clock.now_s += 2.0
    world.step()
    assert world.got[1].finish == ["deadline"]
    before = len(world.tokens(1))
    world.run()
    assert len(world.tokens(1)) == before, "what was in flight is dropped"
    assert world.tokens(0) == expected
    assert world.got[2].finish == ["length"]
    check(world.core.scheduler)


@AHEAD
def test_a_row_without_a_token_fails_alone_though_steps_follow_it(
    make_world, monkeypatch, run_ahead
):
    world = make_world(run_ahead=run_ahead)
    world.submit(1, prompt_of(30), max_tokens=10, ignore_eos=True)
    expected = world.run()[1].token_ids
    world.submit(1, prompt_of(30), max_tokens=10, ignore_eos=True)
    world.got.clear()
    world.submit(2, prompt_of(12, 4), max_tokens=20, ignore_eos=True)
    for _ in range(4):
        world.step()
    model = world.core._runner._step.model
    logits = model.logits

    def poison_second_row(hidden):
        poisoned = logits(hidden)
        poisoned[1, 7] = torch.nan
        return poisoned

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", poison_second_row)
        world.step()
    world.run()
    assert world.got[2].finish == ["error"]
    assert world.tokens(1) == expected
    check(world.core.scheduler)
