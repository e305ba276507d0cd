"""Policy: in which order requests wait, and who yields when memory runs out.

This file has the interface and the plainest policy. One file for each of the others:

    first_come   FirstComeFirstServed, here
    priority     priority.py: classes, and the longer one waits the more urgent it is
    fair_share   fair_share.py: tenants get equal (or weighted) shares, whatever they send
    deadline     deadline_first.py: what is due first; what can't make it any more goes at once

A policy sees each request arrive, start, and leave, and how many tokens each slot draws. It decides
who is next, and the scheduler never admits anyone past the one it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from millrace.scheduler.request import Request
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.slots import Slots

MAX_YIELDS = 3  # a request that has yielded so often goes on, and others yield


class Policy(Protocol):
    """Orders the waiting requests. Those that have ended are skipped unseen."""

    def __iter__(self) -> Iterator[Request]:
        """The waiting requests, in no order."""

    def push(self, request: Request) -> None:
        """The request waits (for the first time, or again after a preemption)."""

    def head(self) -> Request | None:
        """The request that must be admitted next, None if nobody waits. It stays in the queue."""

    def pop(self) -> None:
        """Take the head out: it has a slot now, and `num_computed` tokens that cost nothing."""

    def gone(self, request: Request) -> None:
        """This waiting request has ended."""

    def left(self, request: Request) -> None:
        """This request has ended or yielded, and gives up its slot."""

    def drew(self, slots: Slots) -> None:
        """A token for each of these slots; one may come several times."""

    def hopeless(self, now_s: float) -> Request | None:
        """A waiting request that is not worth starting any more."""

    def victim(self, running: Iterable[Request]) -> Request:
        """Of these (at least one), the request that yields its blocks."""

    def is_pressing(self) -> bool:
        """The head shall wait neither for a slot nor for prompts that have begun before it."""

    def makes_room(self, running: Iterable[Request]) -> Request | None:
        """Of these, the request that yields to a pressing head; None: the head has to wait."""

    def in_order(self, begun: list[Request]) -> list[Request]:
        """These have begun their prompts: in which order they go on with what a step offers."""


class Ordered:
    """A policy that is one key a request, known when it arrives: the least is next.

    A preempted request keeps its key, so it returns as soon as anyone like it. The greatest key
    yields, of those that have not yielded MAX_YIELDS times: these yield only to each other, and the
    least key of them gets on whatever happens. So there is always progress, and nobody starts again
    and again for the sake of others that are a little ahead.
    """

    def __init__(self) -> None:
        self._queue = RequestHeap()

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def key(self, request: Request) -> float:
        """Ties go to the earlier arrival."""
        raise NotImplementedError

    def push(self, request: Request) -> None:
        self._queue.push(self.key(request), request)

    def head(self) -> Request | None:
        return self._queue.head()

    def pop(self) -> None:
        self._queue.pop()

    def gone(self, request: Request) -> None:
        self._queue.gone()

    def left(self, request: Request) -> None:
        """The key does not depend on it."""

    def drew(self, slots: Slots) -> None:
        """The key does not depend on it."""

    def hopeless(self, now_s: float) -> Request | None:
        return None

    def victim(self, running: Iterable[Request]) -> Request:
        return max(running, key=self._readiness_to_yield)

    def _readiness_to_yield(self, request: Request) -> tuple[bool, float, int]:
        return request.num_preemptions < MAX_YIELDS, self.key(request), request.arrival

    def is_pressing(self) -> bool:
        return False

    def makes_room(self, running: Iterable[Request]) -> Request | None:
        return None

    def in_order(self, begun: list[Request]) -> list[Request]:
        return begun


class FirstComeFirstServed(Ordered):
    """By order of arrival: the oldest always gets on."""

    def key(self, request: Request) -> float:
        return request.arrival
