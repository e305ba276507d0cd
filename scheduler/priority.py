"""PriorityWithAging: classes of urgency, and nobody waits for ever.

Class 0 is the most urgent. A request of class c gains one class every `aging_s` seconds, so that
after a wait of w seconds it stands at

    c - w / aging_s

All gain at the same pace, so two requests that wait never change their order, and a key that is
fixed on arrival says it all:  arrived_s + c * aging_s.  Hence the bound: nobody who arrives more
than c * aging_s after a request of class c is admitted before it.
"""

from __future__ import annotations

from millrace.scheduler.policy import Ordered
from millrace.scheduler.request import Request


class PriorityWithAging(Ordered):
    """The least urgent, and of those the youngest, yields."""

    def __init__(self, aging_s: float) -> None:
        super().__init__()
        self._aging_s = aging_s

    def key(self, request: Request) -> float:
        return request.arrived_s + request.priority * self._aging_s
