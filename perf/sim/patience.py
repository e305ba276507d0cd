"""Patience: every accepted request ends within a bound, in turns of the simulated loop.

While a request lives, each turn must bring somebody on. So it cannot live longer than all that were
there when it came, and all that came since, need together; where nobody may overtake, those that
came since do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from millrace.scheduler.request import Request

TURNS_A_TOKEN = 12  # far more than any request needs: beyond it, nothing moves
TURNS_TO_SETTLE = 100


@dataclass(slots=True)
class Patience:
    """`longest`: tokens of prompt and output that a request may have."""

    longest: int
    may_overtake: bool
    turn: int = 0
    num_accepted: int = 0
    _since: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def accepted(self, request: Request, num_live: int) -> None:
        """`num_live` counts this one."""
        self.num_accepted += 1
        self._since[request.id] = (self.turn, num_live, self.num_accepted)

    def ended(self, request: Request) -> None:
        self._check(request.id)
        del self._since[request.id]

    def next_turn(self) -> None:
        """The longest here must have some patience left."""
        self.turn += 1
        if self._since:
            self._check(next(iter(self._since)))

    def _check(self, request_id: int) -> None:
        since, num_live, num_accepted = self._since[request_id]
        peers = num_live + (self.num_accepted - num_accepted if self.may_overtake else 0)
        bound = TURNS_TO_SETTLE + TURNS_A_TOKEN * self.longest * peers
        lived = self.turn - since
        assert lived <= bound, f"request {request_id} lives for {lived} turns beside {peers}"
