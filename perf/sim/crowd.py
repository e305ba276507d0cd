"""Crowd: who comes to a simulated world, and when. Sessions come back for another turn.

A session's next prompt is its last one, the answer to it, and something new. So the prefix cache
has what a chat gives it, and what it gives back can be checked.
"""

from __future__ import annotations

import heapq
import math
from random import Random

from millrace.perf.sim.clock import START_S
from millrace.perf.sim.scenario import Scenario, Turn, draw_request
from millrace.perf.sim.traffic import gap_s
from millrace.scheduler.request import Finish, Request

MEAN_THOUGHT_S = 1.0  # from an answer to the next question


class Crowd:
    """`scenario.num_requests` requests in all, at times that follow from `rng`."""

    def __init__(self, rng: Random, scenario: Scenario) -> None:
        self._rng = rng
        self._gaps = Random(rng.getrandbits(32))
        self._scenario = scenario
        self._newcomer_s = START_S  # when the next request of nobody's session comes
        self._turns: list[tuple[float, int, Turn]] = []  # heap: when, order, what
        self.num_arrived = 0
        self.num_next_turns = 0

    @property
    def next_s(self) -> float:
        """When somebody comes next; inf: nobody does."""
        if self.num_arrived >= self._scenario.num_requests:
            return math.inf
        return min(self._newcomer_s, self._turns[0][0] if self._turns else math.inf)

    def come(self, true_s: float, told_s: float) -> Request | None:
        """Who is there by now, one at a time; their clocks are the one that is told."""
        if math.isinf(self.next_s) or self.next_s > true_s:
            return None
        turn = None
        if self._turns and self._turns[0][0] <= self._newcomer_s:
            turn = heapq.heappop(self._turns)[2]
            self.num_next_turns += 1
        else:
            scenario = self._scenario
            self._newcomer_s += gap_s(self._gaps, scenario.mean_gap_s, scenario.gap_cv)
        request = draw_request(self._rng, self._scenario, self.num_arrived, told_s, turn)
        self.num_arrived += 1
        return request

    def ended(self, request: Request, true_s: float) -> None:
        """A request is over; whoever got a whole answer may have another question."""
        has_answer = request.finish in (Finish.LENGTH, Finish.STOP)
        if not has_answer or self._rng.random() >= self._scenario.session:
            return
        room = self._scenario.max_prompt - request.num_known
        if room < 1:
            return
        thought_s = self._gaps.expovariate(1.0 / MEAN_THOUGHT_S)
        turn = Turn(request.prompt.tolist() + request.outputs, request.tenant, room)
        heapq.heappush(self._turns, (true_s + thought_s, request.id, turn))
