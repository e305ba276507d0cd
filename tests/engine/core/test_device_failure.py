"""A device that fails when its results are read: who ends, what goes on, and when nothing can."""

import numpy as np
import pytest

from millrace.engine.core import loop, main
from millrace.engine.core.messages import Cancel
from millrace.engine.core.process import DEVICE_LOST_EXIT_CODE, _describe
from millrace.engine.errors import DeviceLost
from millrace.engine.runner.copies import SharedMemory
from millrace.scheduler.invariants import check

AHEAD = pytest.mark.parametrize("run_ahead", [0, 1, 2])
FAULT = "an illegal memory access was encountered"


class FaultyDevice(SharedMemory):
    """Its next `faults` results cannot be read; a lost one never answers again."""

    def __init__(self):
        self.faults, self.is_lost = 0, False

    def fetch(self, tensor):
        return Late(self, super().fetch(tensor))

    def settle(self):
        self.check()

    def check(self):
        if self.is_lost:
            raise RuntimeError(FAULT)
        if self.faults:
            self.faults -= 1
            raise RuntimeError(FAULT)


class Late:
    def __init__(self, device, arrived):
        self.device, self.arrived = device, arrived

    def wait(self):
        self.device.check()
        return self.arrived.wait()


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 199, length).tolist()


def submit(world, request_id):
    """The same request but for its id: its tokens are known."""
    world.submit(request_id, prompt_of(30), max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture
def busy(make_world):
    """busy(run_ahead): a world of two slots, two requests in them and two behind; its device."""

    def make(run_ahead):
        world = make_world(run_ahead=run_ahead, max_running=2)
        world.core._runner._copies = device = FaultyDevice()
        submit(world, 0)
        expected = world.run()[0].token_ids
        for request_id in (1, 2, 3, 4):
            submit(world, request_id)
        for _ in range(6):
            world.step()
        return world, device, expected

    return make


@AHEAD
def test_a_fault_ends_what_runs_and_serves_what_waits(busy, run_ahead):
    world, device, expected = busy(run_ahead)
    device.faults = 1
    world.step()
    for request_id in (1, 2):
        assert world.got[request_id].finish == ["error"]
        assert FAULT in world.got[request_id].last.error
        tokens = world.tokens(request_id)
        assert tokens == expected[: len(tokens)], "what came before the fault is right"
    world.run()
    for request_id in (3, 4):
        assert world.got[request_id].finish == ["length"]
        assert world.tokens(request_id) == expected
    assert world.core.scheduler.pool.num_referenced == 0
    check(world.core.scheduler)


@AHEAD
def test_a_fault_beside_a_cancelled_and_a_new_request_leaks_nothing(busy, run_ahead):
    world, device, expected = busy(run_ahead)
    world.core.handle(Cancel([1, 3]))
    submit(world, 5)
    device.faults = 1
    world.run()
    ends = {request_id: world.got[request_id].finish for request_id in (1, 2, 3, 4, 5)}
    assert ends[1] == ends[3] == ["cancelled"] and ends[2] == ["error"]
    assert all(len(finish) == 1 for finish in ends.values())
    assert world.tokens(5) == expected
    check(world.core.scheduler)


@AHEAD
def test_who_asked_for_logprobs_before_a_fault_is_forgotten(busy, run_ahead):
    world, device, expected = busy(run_ahead)
    world.submit(6, prompt_of(20), max_tokens=30, logprobs=2, prompt_logprobs=1)
    world.core.handle(Cancel([1, 2, 3, 4]))
    for _ in range(4):
        world.step()
    device.faults = 1
    world.step()
    assert world.got[6].finish == ["error"]
    submit(world, 7)
    got = world.run()[7]
    assert got.token_ids == expected and not got.logprobs and not got.prompt_logprobs


@AHEAD
def test_a_lost_device_is_named_and_ends_everything(busy, run_ahead):
    world, device, _ = busy(run_ahead)
    device.is_lost = True
    with pytest.raises(DeviceLost, match=FAULT):
        world.step()
    world.core.handle(Cancel([3, 4]))  # as an LLM does when it gives up
    world.step()
    ends = [world.got[request_id].finish for request_id in (1, 2, 3, 4)]
    assert ends == [["error"], ["error"], ["cancelled"], ["cancelled"]]
    submit(world, 5)
    with pytest.raises(DeviceLost):
        world.run()


def test_the_core_s_process_leaves_at_once_with_a_code_that_says_why(monkeypatch, caplog):
    def lose(serve):
        raise DeviceLost("the device is lost to this process: ECC error")

    codes = []
    monkeypatch.setattr(main, "run_core", lose)
    monkeypatch.setattr(main.os, "_exit", codes.append)
    main.main()
    assert codes == [DEVICE_LOST_EXIT_CODE]
    assert "ECC error" in caplog.text
    assert "lost its device" in _describe(DEVICE_LOST_EXIT_CODE)


class Clock:
    """Moves only when it is told to."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@AHEAD
def test_waiting_for_the_device_is_not_the_host_s_time(make_world, monkeypatch, run_ahead):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    world = make_world(run_ahead=run_ahead)
    runner, scheduler = world.core._runner, world.core.scheduler
    launch, apply = runner.execute, scheduler.apply

    def launch_slowly(plan):
        clock.now_s += 0.25
        launched = launch(plan)
        read = launched.drawn.wait

        class Slow:
            def wait(self):
                clock.now_s += 4.0
                return read()

        launched.drawn = Slow()
        return launched

    def apply_slowly(result, now_s):
        clock.now_s += 0.5
        return apply(result, now_s)

    monkeypatch.setattr(runner, "execute", launch_slowly)
    monkeypatch.setattr(scheduler, "apply", apply_slowly)
    world.submit(1, prompt_of(20), max_tokens=8, ignore_eos=True)
    world.run()
    steady = world.stats[run_ahead + 1 : -run_ahead - 1]
    assert len(steady) > 3
    assert {(stats.step_s, stats.host_s) for stats in steady} == {(4.25, 0.5)}
