"""What the pictures of docs/ are drawn from, and the fairness figures; the runs are commands."""

import pytest

from millrace.perf.fairness import GOAL, Outcome, report
from millrace.perf.timelines import FEW, MANY, Row, State, crowd, draw


def test_a_row_joins_steps_of_one_state():
    row = Row(FEW)
    for step, state in enumerate([State.WAIT, State.WAIT, State.PROMPT, State.DECODE]):
        row.add(state, step)
    assert row.spans == [(State.WAIT, 0, 2), (State.PROMPT, 2, 3), (State.DECODE, 3, 4)]


def test_the_crowd_comes_in_order_of_steps():
    arrivals = crowd()
    assert [a.tenant for a in arrivals] == [MANY] * 10 + [FEW] * 4
    assert arrivals == sorted(arrivals, key=lambda arrival: arrival.step)


def test_a_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    row = Row(FEW, [(State.WAIT, 0, 2)], finish="deadline")
    draw("deadline", [row, Row(MANY, [(State.DECODE, 0, 3)])], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratio_is_of_medians_and_stands_beside_its_goal():
    found = report(Outcome([1.0, 2.0, 9.0], [3.0, 5.0, 4.0], (8, 30)), preemptions=3.0)
    assert (found["ttft_ratio"], found["goal"], found["met"]) == (2.0, GOAL, True)
    assert not report(Outcome([1.0], [2.5], (8, 30)), 0.0)["met"]
