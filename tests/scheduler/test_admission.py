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
    assert decision.field == "queue"
    assert FIRST_GUESS_S <= decision.retry_after_s <= MAX_RETRY_AFTER_S


def retry_after(interval_s: float) -> float:
    admission = Admission(max_waiting=10, max_waiting_tokens=1000)
    for end in range(100):
        admission.ended(now_s=100.0 + end * interval_s)
    return decide(admission, waiting=10).retry_after_s


def test_a_slower_drain_asks_for_more_patience():
    assert retry_after(interval_s=4.0) == pytest.approx(4.0 * 10 / 2, rel=0.01)
    assert retry_after(interval_s=0.001) == FIRST_GUESS_S
    assert retry_after(interval_s=1000.0) == MAX_RETRY_AFTER_S
