"""RequestHeap: live requests by a key, the least first. The queue and the deadlines are such heaps.

A request that ends stays where it is, dead, until the dead are half of the heap: so ending costs
O(1) amortised, and the heap never holds more than about twice what lives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from millrace.scheduler.request import Request


class RequestHeap:
    """Ties go to the earlier arrival. A request is in it once at most."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Request]] = []  # key, arrival, request
        self._num_dead = 0

    def __iter__(self) -> Iterator[Request]:
        """The live requests, in no order."""
        return (entry[2] for entry in self._entries if entry[2].finish is None)

    def push(self, key: float, request: Request) -> None:
        """Add a live request."""
        heapq.heappush(self._entries, (key, request.arrival, request))

    def head(self, limit: float = math.inf) -> Request | None:
        """The live request with the least key, if that is at most `limit`. It stays."""
        while self._entries and self._entries[0][2].finish is not None:
            heapq.heappop(self._entries)
            self._num_dead -= 1
        if self._entries and self._entries[0][0] <= limit:
            return self._entries[0][2]
        return None

    def pop(self) -> None:
        """Take the head out, just after `head()` gave it."""
        heapq.heappop(self._entries)

    def gone(self) -> None:
        """One of its requests has ended."""
        self._num_dead += 1
        if 2 * self._num_dead > len(self._entries):
            self._entries = [entry for entry in self._entries if entry[2].finish is None]
            heapq.heapify(self._entries)
            self._num_dead = 0
