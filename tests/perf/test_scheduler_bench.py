"""The bench drives the scheduler as an engine would: its figures are of steps that are right."""

from millrace.perf.scheduler_bench import Driver, cancel_waiting, steady_step
from millrace.scheduler.invariants import check


def test_the_driver_keeps_all_decoding_and_the_state_sound():
    driver = Driver(max_running=8, num_decodes=8)
    for _ in range(40):  # past the ends of two blocks
        driver.step()
    check(driver.scheduler)
    assert driver.scheduler.num_running == 8
    assert driver.scheduler.counters.preemptions == 0


def test_its_figures_are_times():
    assert 0.0 < steady_step(4, num_waiting=3) < 1e6
    assert 0.0 < cancel_waiting(8) < 1e6
