"""EarliestDeadlineFirst: what is due first is next; what can't make it any more goes at once.

A request is hopeless if even alone it could not draw its first token in time: then a prefill would
be lost on it, and on those behind it. So it ends while it waits. Requests without a deadline come
after all that have one, in order of arrival.

In an overload this order alone would serve everyone a little too late; shedding is what keeps it
useful. Whoever has no deadline may starve: give everyone one (`default_timeout_s`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from millrace.scheduler.policy import Ordered
from millrace.scheduler.request import Request


class EarliestDeadlineFirst(Ordered):
    """`first_token_s`: how long a request takes at least, from its start to its first token."""

    def __init__(self, first_token_s: Callable[[Request], float]) -> None:
        super().__init__()
        self._first_token_s = first_token_s

    def key(self, request: Request) -> float:
        return math.inf if request.deadline_s is None else request.deadline_s

    def hopeless(self, now_s: float) -> Request | None:
        """Only the head is looked at: the others can wait until it is their turn."""
        head = self.head()
        if head is None or head.deadline_s is None:
            return None
        return head if now_s + self._first_token_s(head) > head.deadline_s else None
