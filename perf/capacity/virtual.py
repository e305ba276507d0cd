"""A server in virtual time: the real Scheduler, a device that only takes time, and no tokens.

The loop is EngineCore's (engine/core/loop.py): plan and launch a step, then take in the oldest one
if more than `run_ahead` are in flight. A step's host time is taken to be hidden behind the device,
or, where the cost was measured, to be in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from millrace.perf.capacity.latencies import Latencies
from millrace.perf.sim.device import Device, Roughness, StepCost
from millrace.perf.sim.load import Load, LoadCounter
from millrace.scheduler.admission import Accepted
from millrace.scheduler.cost_model import StepLoad
from millrace.scheduler.plan import StepPlan, StepResult
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Scheduler

EVEN = Roughness()


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """What a run needs; it can be run at many rates."""

    make_scheduler: Callable[[], Scheduler]
    cost: StepCost
    run_ahead: int
    roughness: Roughness = EVEN
    seed: int = 0
    widths: tuple[int, ...] = ()  # of the model's sliding windows, tokens

    def run(self, requests: list[Request]) -> Run:
        """Serve these, which come in order, to the end of the last."""
        device = Device(self.cost, Random(self.seed), self.roughness)
        run = Run(self.make_scheduler(), device, requests, self.widths)
        run.to_the_end(self.run_ahead)
        return run


@dataclass(slots=True)
class _Launched:
    """A step in flight."""

    plan: StepPlan
    load: Load
    seconds: float
    slots: np.ndarray  # that draw


@dataclass
class Run:
    """One run, and what came of it."""

    scheduler: Scheduler
    device: Device
    requests: list[Request]
    widths: tuple[int, ...] = ()
    now_s: float = 0.0
    refused: int = 0
    swapped_blocks: int = 0  # out and in
    running: list[int] = field(default_factory=list)  # by step
    blocks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _in_flight: deque[_Launched] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.latencies = Latencies([request.arrived_s for request in self.requests])
        self._loads = LoadCounter(self.scheduler.limits.max_running, self.widths)

    def to_the_end(self, run_ahead: int) -> None:
        coming = iter(self.requests)
        next_one = next(coming, None)
        while next_one is not None or self._in_flight or self.scheduler.requests:
            if self.scheduler.is_idle and not self._in_flight and next_one is not None:
                self.now_s = max(self.now_s, next_one.arrived_s)
            while next_one is not None and next_one.arrived_s <= self.now_s:
                self.refused += not isinstance(self.scheduler.submit(next_one), Accepted)
                next_one = next(coming, None)
            self.scheduler.expire(self.now_s)
            plan = self.scheduler.schedule(self.now_s)
            if plan is not None:
                self._launch(plan)
            if len(self._in_flight) > (run_ahead if plan is not None else 0):
                self._land(self._in_flight.popleft())
            self._settle()

    def _launch(self, plan: StepPlan) -> None:
        load = self._loads.count(plan)
        seconds = self.device.launch(load, self.now_s)
        done = [chunk.slot for chunk in plan.prefill if chunk.samples]
        slots = np.concatenate([self._loads.decoding(), np.asarray(done, np.intp)])
        self._in_flight.append(_Launched(plan, load, seconds, slots))
        self.running.append(self.scheduler.num_running)
        self.blocks.append(self.scheduler.pool.num_referenced)
        self.seconds.append(seconds)
        self.swapped_blocks += load.swapped_blocks

    def _land(self, launched: _Launched) -> None:
        self.now_s = max(self.now_s, self.device.land())
        load, count = launched.load, len(launched.slots)
        if self.scheduler.cost is not None:
            step = StepLoad(load.prefill_tokens, load.decodes, load.context_tokens)
            self.scheduler.cost.measured(step, launched.seconds)
        result = StepResult(
            launched.plan.step,
            launched.slots,
            np.zeros(count, np.int64),
            np.zeros(count, np.bool_),
            np.ones(count, np.bool_),
        )
        drawn = self.scheduler.apply(result, self.now_s)
        self.latencies.drew(drawn.request_ids, self.now_s)

    def _settle(self) -> None:
        for request in self.scheduler.take_ended():
            self.latencies.is_whole[request.id] = request.finish is Finish.LENGTH

    # ------------------------------------------------------------ of the whole run

    def mean(self, by_step: list[int]) -> float:
        """Of `running` or `blocks`, each step for as long as it took."""
        return float(np.average(by_step, weights=self.seconds))

    def p95(self, by_step: list[int]) -> float:
        """What is not exceeded in 95 % of the time."""
        order = np.argsort(by_step)
        passed = np.cumsum(np.asarray(self.seconds)[order])
        return float(np.asarray(by_step)[order][np.searchsorted(passed, 0.95 * passed[-1])])
