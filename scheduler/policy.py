"""Policies: in which order requests wait, and who yields when memory runs out.

First come, first served is the one policy so far; others implement the same three methods.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol

from millrace.scheduler.request import Request


class Policy(Protocol):
    """Orders the waiting requests. Entries of requests that have ended are skipped unseen."""

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
        self._heap: list[tuple[int, Request]] = []
        self._num_dead = 0

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.arrival, request))

    def head(self) -> Request | None:
        while self._heap and self._heap[0][1].finish is not None:
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        heapq.heappop(self._heap)

    def gone(self, request: Request) -> None:
        """O(1) amortised: the entry stays, dead, until the dead are half of the heap."""
        self._num_dead += 1
        if 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].finish is None]
            heapq.heapify(self._heap)
            self._num_dead = 0

    def victim(self, running: Iterable[Request]) -> Request:
        """The youngest: the oldest always gets on, so there is always progress."""
        return max(running, key=lambda request: request.arrival)
