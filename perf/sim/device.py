"""Device: its steps take virtual time, one after the other, as a cost model says, give or take.

It computes nothing. What a step's tokens are is another's business (runner.py, or nobody's where
only times matter).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from millrace.perf.sim.load import Load

StepCost = Callable[[Load], float]
"""Seconds of a step with this load."""


@dataclass(frozen=True, slots=True)
class Roughness:
    """How far steps stray from their cost."""

    sigma: float = 0.0  # of the logarithm of a step's time over its cost
    stall: float = 0.0  # chance that a step takes `stall_factor` times as long
    stall_factor: float = 10.0


@dataclass(slots=True)
class Device:
    """Runs launched steps in order; the host may launch one before the last has ended."""

    cost: StepCost
    rng: Random
    roughness: Roughness = Roughness()
    _free_s: float = 0.0  # when the newest launched step will have ended
    _ends_s: deque[float] = field(default_factory=deque)  # of the steps in flight

    def launch(self, load: Load, now_s: float) -> float:
        """Begin a step now, or once the one before it has ended; returns how long it takes."""
        seconds = self.cost(load)
        if self.roughness.sigma:
            seconds *= self.rng.lognormvariate(0.0, self.roughness.sigma)
        if self.roughness.stall and self.rng.random() < self.roughness.stall:
            seconds *= self.roughness.stall_factor
        self._free_s = max(self._free_s, now_s) + seconds
        self._ends_s.append(self._free_s)
        return seconds

    def land(self) -> float:
        """When the oldest step in flight ends; it is in flight no more."""
        return self._ends_s.popleft()

    def lose(self) -> None:
        """The steps in flight never end."""
        self._ends_s.clear()
        self._free_s = 0.0
