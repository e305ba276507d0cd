"""Policies by name, as a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from millrace.scheduler.deadline_first import EarliestDeadlineFirst
from millrace.scheduler.fair_share import FairShare
from millrace.scheduler.policy import FirstComeFirstServed, Policy
from millrace.scheduler.priority import PriorityWithAging
from millrace.scheduler.request import Request


def make_policy(
    name: str, num_slots: int, aging_s: float, first_token_s: Callable[[Request], float]
) -> Policy:
    """`aging_s` is for "priority", `first_token_s` for "deadline". ValueError: no such policy."""
    match name:
        case "first_come":
            return FirstComeFirstServed()
        case "priority":
            return PriorityWithAging(aging_s)
        case "fair_share":
            return FairShare(num_slots)
        case "deadline":
            return EarliestDeadlineFirst(first_token_s)
    raise ValueError(f"no policy is called {name!r}")
