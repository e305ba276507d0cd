"""Admission: accept a request into the queue, or refuse it at once and say why.

A refusal is a value, costs no device work and no block, and tells when trying again makes sense.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.scheduler.request import Request

SMOOTHING = 0.1  # weight of the newest interval in the drain rate
FIRST_GUESS_S = 1.0  # retry hint before anything has finished
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request waits, and will end exactly once."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was not taken."""

    reason: str
    field: str  # of the request, or of Limits, where it is the queue that is full
    limit: str
    retry_after_s: float = 0.0  # 0: it can never be taken


Decision = Accepted | Refused


class Admission:
    """Bounds on the queue, and the rate at which requests leave the system."""

    def __init__(
        self, max_waiting: int, max_waiting_tokens: int, max_wait_s: float | None = None
    ) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._max_wait_s = max_wait_s
        self._has_rate = False
        self._interval_s = FIRST_GUESS_S  # smoothed time between two ends
        self._last_end_s: float | None = None

    def decide(self, request: Request, longest: int, waiting: int, waiting_tokens: int) -> Decision:
        """`longest`: prompt and output tokens that one request may have; the rest is the queue."""
        prompt_tokens = len(request.prompt)
        if prompt_tokens == 0:
            return Refused("the prompt is empty", "prompt", "at least 1 token")
        if request.max_tokens < 1:
            return Refused(f"max_tokens is {request.max_tokens}", "max_tokens", "at least 1")
        if request.lookahead < 0:
            return Refused(f"lookahead is {request.lookahead}", "lookahead", "at least 0")
        if request.max_length > longest:
            reason = f"prompt and output may be {request.max_length} tokens, more than ever fit"
            return Refused(reason, "max_tokens", f"at most {longest} tokens of prompt and output")
        if prompt_tokens > self._max_waiting_tokens:
            reason = f"the prompt has {prompt_tokens} tokens, more than the queue ever holds"
            return Refused(reason, "prompt", f"at most {self._max_waiting_tokens} tokens")
        if waiting >= self._max_waiting:
            return self._busy(waiting, "max_waiting", f"{self._max_waiting} waiting requests")
        if waiting_tokens + prompt_tokens > self._max_waiting_tokens:
            limit = f"{self._max_waiting_tokens} waiting prompt tokens"
            return self._busy(waiting, "max_waiting_tokens", limit)
        expected_s = self.expected_wait_s(waiting)
        if self._max_wait_s is not None and expected_s > self._max_wait_s:
            reason = f"the wait would be about {expected_s:.1f} s"
            retry_s = min(MAX_RETRY_AFTER_S, max(FIRST_GUESS_S, expected_s - self._max_wait_s))
            limit = f"at most {self._max_wait_s:g} s of waiting"
            return Refused(reason, "max_wait_s", limit, retry_s)
        return Accepted()

    def expected_wait_s(self, waiting: int) -> float:
        """Until these have left the queue, at the pace of late; 0 before any is known."""
        return self._interval_s * waiting if self._has_rate else 0.0

    def ended(self, now_s: float, waiting: int) -> None:
        """A request has left the system. Only while others wait does that show how fast it is."""
        if self._last_end_s is not None:
            interval = min(max(0.0, now_s - self._last_end_s), MAX_RETRY_AFTER_S)
            weight = SMOOTHING if self._has_rate else 1.0
            self._interval_s += weight * (interval - self._interval_s)
            self._has_rate = True
        self._last_end_s = now_s if waiting else None

    def _busy(self, waiting: int, field: str, limit: str) -> Refused:
        # Half the queue drained is room worth coming back for.
        wait_s = min(MAX_RETRY_AFTER_S, max(FIRST_GUESS_S, self._interval_s * waiting / 2))
        return Refused("the queue is full", field, f"at most {limit}", wait_s)
