"""The bench drives the scheduler as an engine would: its figures are of steps that are right."""

from xml.etree import ElementTree

import pytest

from millrace.perf.peers import nano_scheduler
from millrace.perf.plot import SHARES
from millrace.perf.scheduler_bench import MICROSECONDS, OURS, Case, Curve, measure, plot
from millrace.perf.scheduler_costs import (
    OUTPUT,
    PROMPT,
    cancel_waiting,
    comes_or_goes,
    decoding,
    prompt_comes,
    steady_step,
)
from millrace.perf.scheduler_driver import MillraceDriver
from millrace.scheduler.invariants import check


def test_the_driver_keeps_all_decoding_and_the_state_sound():
    driver = decoding(MillraceDriver, 8, 8, kv_tokens=8 * (PROMPT + OUTPUT))
    for _ in range(40):  # past the ends of two blocks
        driver.step()
        assert driver.num_drawn == 8
    check(driver.scheduler)
    assert driver.scheduler.num_running == 8
    assert driver.scheduler.counters.preemptions == 0


def test_its_figures_are_times():
    assert 0.0 < steady_step(MillraceDriver, running=4, waiting=3) < 1e6
    assert 0.0 < prompt_comes(MillraceDriver, length=300) < 1e6
    assert 0.0 < cancel_waiting(MillraceDriver, waiting=8) < 1e6
    assert -1e5 < comes_or_goes(MillraceDriver, does_come=True) < 1e6


def test_a_peer_that_is_not_there_is_left_out_and_the_reason_is_told(tmp_path):
    assert "--nano-path" in nano_scheduler.load(None)
    assert "not installed" in nano_scheduler.load(tmp_path)


@pytest.mark.parametrize("peers", [{}, {"vLLM": MillraceDriver}])
def test_a_curve_has_a_line_for_each_scheduler_that_was_measured(peers):
    cases = {n: Case(f"step {n}", lambda make, n=n: float(n), ("vLLM",)) for n in (1, 64)}
    found = measure(list(cases.values()), peers)
    assert found["step 64"] == dict.fromkeys([OURS, *peers], 64.0)
    text = plot(Curve("x", "A step", "requests", cases), found)
    ElementTree.fromstring(text)
    assert text.count("<polyline") == 1 + len(peers)


def test_microseconds_stand_on_a_logarithmic_axis_and_shares_on_a_linear_one():
    assert [MICROSECONDS.share(us) for us in (0.01, 1.0, 1e3, 1e6, 1e9)] == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )
    assert MICROSECONDS.label(1e4) == "10,000 us"
    assert [SHARES.share(y) for y in (-1.0, 0.0, 0.55, 2.0)] == pytest.approx([0, 0, 0.5, 1])
