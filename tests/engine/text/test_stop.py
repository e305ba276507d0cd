"""StopMatcher against a search of the whole text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.errors import InvalidRequest
from millrace.engine.text.stop import StopMatcher

AB = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], deltas: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop)
    released = ""
    for delta in deltas:
        text, stop = matcher.push(delta)
        released += text
        if stop is not None:
            return released, stop
    return released + matcher.finish(), None


def search(stops: list[str], text: str, include_stop: bool) -> tuple[str, str | None]:
    """The definition: the first character that completes a stop, and the longest stop there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@given(STOPS, st.lists(AB, max_size=8), st.booleans())
def test_any_split_equals_a_search_of_the_whole(
    stops: list[str], deltas: list[str], include_stop: bool
) -> None:
    assert run(stops, deltas, include_stop) == search(stops, "".join(deltas), include_stop)


@given(STOPS, AB)
def test_holds_back_exactly_what_may_begin_a_stop(stops: list[str], text: str) -> None:
    released, stop = StopMatcher(stops).push(text)
    if stop is None:
        suffixes = [text[start:] for start in range(len(text) + 1)]
        possible = [s for s in suffixes if any(stop.startswith(s) for stop in stops)]
        assert text[len(released) :] == max(possible, key=len, default="")


def test_a_stop_may_span_many_deltas() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.push("42</ans") == ("42", None)
    assert [matcher.push(c) for c in "wer"] == [("", None)] * 3
    assert matcher.push("> more") == ("", "</answer>")
    assert matcher.push("ignored") == ("", "</answer>")
    assert matcher.finish() == ""


def test_a_false_start_is_released() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("xaa") == ("x", None)
    assert matcher.push("a") == ("a", None)
    assert matcher.push("c") == ("aac", None)
    assert matcher.push("aa") == ("", None)
    assert matcher.finish() == "aa"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(["x", ""])
    assert caught.value.field == "stop"


def test_time_is_linear_in_the_text() -> None:
    """A naive scan compares 256 characters at each of 200,000 positions."""
    matcher = StopMatcher(["a" * 255 + "b", "a" * 200 + "c"])
    start = time.process_time()
    for _ in range(2000):
        assert matcher.push("a" * 100)[1] is None
    assert time.process_time() - start < 2.0
