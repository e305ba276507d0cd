"""Policies: in which order requests wait, and who yields when memory runs out.

First come, first served is the one policy so far; others implement the same methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from millrace.scheduler.request import Request
from millrace.scheduler.request_heap import RequestHeap


class Policy(Protocol):
    """Orders the waiting requests. Those that have ended are skipped unseen."""

    def __iter__(self) -> Iterator[Request]:
        """The waiting requests, in no order."""

    def push(self, request: Request) -> None:
        """The request waits (for the first time, or again after a preemption)."""

    def head(self) -> Request | None:
        """The request that must be admitted next, None if nobody waits. It stays in the queue."""

    def pop(self) -> None:
        """Take the head out."""

    def gone(self, request: Request) -> None:
        """This waiting request has ended."""

    def victim(self, running: Iterable[Request]) -> Request:
        """Of these (at least one), the request that yields its blocks."""


class FirstComeFirstServed:
    """By order of arrival. A preempted request keeps its rank, so it is the first to return."""

    def __init__(self) -> None:
        self._queue = RequestHeap()

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def push(self, request: Request) -> None:
        self._queue.push(request.arrival, request)

    def head(self) -> Request | None:
        return self._queue.head()

    def pop(self) -> None:
        self._queue.pop()

    def gone(self, request: Request) -> None:
        self._queue.gone()

    def victim(self, running: Iterable[Request]) -> Request:
        """The youngest: the oldest always gets on, so there is always progress."""
        return max(running, key=lambda request: request.arrival)
