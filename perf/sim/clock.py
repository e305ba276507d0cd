"""Clock: virtual time as it is, and as the scheduler is told, which need not be the same.

A process that was stopped, or a machine that slept, sees minutes pass at once; a coarse clock
stands still; and a clock that somebody sets may go back. None of it may lose a request, or end one
before what its deadline says by the time that was told.
"""

from __future__ import annotations

from random import Random

START_S = 1000.0  # so that no jump leads below zero
JUMP_S = 600.0  # at most, ahead; half of that back
STANDSTILL_S = 20.0  # at most


class Clock:
    """`jump` is the chance at each tick that something is wrong with the time that is told."""

    def __init__(self, rng: Random, jump: float) -> None:
        self._rng = rng
        self._jump = jump
        self._offset_s = 0.0
        self._stands_until_s = 0.0  # of the true time
        self.true_s = START_S
        self.told_s = START_S
        self.num_jumps = 0

    def tick(self) -> None:
        """A chance for mischief."""
        if not self._jump or self._rng.random() >= self._jump:
            return
        self.num_jumps += 1
        match self._rng.randrange(3):
            case 0:
                self._offset_s += self._rng.uniform(0.0, JUMP_S)
            case 1:
                self._offset_s -= self._rng.uniform(0.0, JUMP_S / 2)
            case _:
                self._stands_until_s = self.true_s + self._rng.uniform(0.0, STANDSTILL_S)
        self._tell()

    def wait_until(self, when_s: float) -> None:
        """Time passes up to `when_s` of the true time; nothing happens if that is past."""
        self.true_s = max(self.true_s, when_s)
        self._tell()

    def _tell(self) -> None:
        if self.true_s >= self._stands_until_s:
            self.told_s = max(1.0, self.true_s + self._offset_s)
