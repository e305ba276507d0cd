"""Admission: a refusal names what is wrong, and says whether to come back."""

import numpy as np
import pytest

from millrace.scheduler.admission import (
    FIRST_GUESS_S,
    MAX_RETRY_AFTER_S,
    Accepted,
    Admission,
    Refused,
)
from millrace.scheduler.request import Request

LONGEST = 30  # tokens of prompt and output


def decide(admission, prompt=4, max_tokens=1, waiting=0, waiting_tokens=0):
    request = Request(id=0, prompt=np.zeros(prompt, np.int32), max_tokens=max_tokens)
    return admission.decide(request, LONGEST, waiting, waiting_tokens)


def test_what_fits_is_accepted_up_to_the_limits_themselves():
    admission = Admission(max_waiting=3, max_waiting_tokens=20)
    assert decide(admission, max_tokens=LONGEST - 4, waiting=2, waiting_tokens=16) == Accepted()


@pytest.mark.parametrize(
    ("case", "field"),
    [
        ({"max_tokens": LONGEST - 3}, "max_tokens"),
        ({"prompt": 0}, "prompt"),
        ({"prompt": 21}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_can_never_run_is_refused_for_good(case, field):
    decision = decide(Admission(max_waiting=3, max_waiting_tokens=20), **case)
    assert isinstance(decision, Refused)
    assert (decision.field, decision.retry_after_s) == (field, 0.0)
    assert decision.reason
    assert decision.limit


@pytest.mark.parametrize("case", [{"waiting": 3}, {"waiting": 1, "waiting_tokens": 17}])
def test_a_full_queue_says_when_to_come_back(case):
    decision = decide(Admission(max_waiting=3, max_waiting_tokens=20), **case)
    assert isinstance(decision, Refused)
    assert decision.field.startswith("max_waiting")
    assert FIRST_GUESS_S <= decision.retry_after_s <= MAX_RETRY_AFTER_S


def retry_after(interval_s: float) -> float:
    admission = Admission(max_waiting=10, max_waiting_tokens=1000)
    for end in range(100):
        admission.ended(now_s=100.0 + end * interval_s, waiting=5)
    return decide(admission, waiting=10).retry_after_s


def test_a_slower_drain_asks_for_more_patience():
    assert retry_after(interval_s=4.0) == pytest.approx(4.0 * 10 / 2, rel=0.01)
    assert retry_after(interval_s=0.001) == FIRST_GUESS_S
    assert retry_after(interval_s=1000.0) == MAX_RETRY_AFTER_S


def draining(interval_s: float, max_wait_s: float) -> Admission:
    admission = Admission(max_waiting=1000, max_waiting_tokens=10**6, max_wait_s=max_wait_s)
    for end in range(20):
        admission.ended(now_s=end * interval_s, waiting=5)
    return admission


def test_who_would_wait_too_long_is_told_how_long_it_takes_until_that_changes():
    admission = draining(interval_s=0.5, max_wait_s=10.0)
    assert decide(admission, waiting=20) == Accepted()
    decision = decide(admission, waiting=28)
    assert isinstance(decision, Refused)
    assert (decision.field, decision.limit) == ("max_wait_s", "at most 10 s of waiting")
    assert decision.retry_after_s == pytest.approx(28 * 0.5 - 10.0)


def test_nobody_is_refused_for_a_wait_before_a_pace_is_known():
    admission = Admission(max_waiting=1000, max_waiting_tokens=10**6, max_wait_s=0.1)
    assert decide(admission, waiting=900) == Accepted()


def test_hours_without_work_are_not_taken_for_slowness():
    admission = draining(interval_s=0.01, max_wait_s=5.0)
    admission.ended(now_s=0.2, waiting=0)
    for hour in range(1, 10):
        admission.ended(now_s=3600.0 * hour, waiting=0)
    assert decide(admission, waiting=100) == Accepted()
