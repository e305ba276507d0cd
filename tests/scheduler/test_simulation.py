"""Hundreds of small worlds in which everything goes wrong at once, and no token may change.

`SIM_SEED=n` replays one of them; the slow run goes through thousands.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.perf.sim.scenario import MANY, POLICIES
from millrace.perf.sim.world import World, simulate
from millrace.scheduler.request import Finish

SEEDS, BATCH = 300, 30
SLOW_SEEDS, SLOW_BATCH = 20_000, 1000
SMALL = 5  # requests, where hypothesis shrinks a world
REPLAYED = os.environ.get("SIM_SEED")


def batches(first: int, last: int, size: int) -> list[range]:
    if REPLAYED is not None:
        return [range(int(REPLAYED), int(REPLAYED) + 1)]
    return [range(start, start + size) for start in range(first, last, size)]


@pytest.mark.parametrize("seeds", batches(0, SEEDS, BATCH), ids=str)
def test_every_request_gets_its_own_tokens_whatever_happens(seeds):
    for seed in seeds:
        simulate(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", batches(SEEDS, SLOW_SEEDS + SEEDS, SLOW_BATCH), ids=str)
def test_every_request_gets_its_own_tokens_in_thousands_of_worlds(seeds):
    for seed in seeds:
        simulate(seed)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_every_request_gets_its_own_tokens_in_worlds_that_shrink(rng):
    World(rng, max_requests=SMALL).run()


def test_a_seed_gives_the_same_events_every_time():
    for seed in range(5):
        assert simulate(seed).log == simulate(seed).log
    assert simulate(0).log != simulate(1).log


def test_the_worlds_are_as_rough_as_they_should_be():
    """A simulation in which nothing happens would prove nothing.

    What is asked for is about a third of what happened when this was written: a scenario that draws
    one number more has other worlds, and they are as rough.
    """
    happened, preemptions = Counter(), Counter()
    for seed in range(150):
        world = simulate(seed)
        happened += world.tally()
        happened["copies"] += sum("copied [(" in line for line in world.log)
        happened["drafted"] += sum("drafts [[" in line for line in world.log)
        happened["swapped in"] += world.scheduler._tables.host.num_swapped_in
        preemptions[world.scenario.policy] += world.scheduler.counters.preemptions
    for what in [*Finish, "refused", "preempted", "abandoned", "next turns"]:
        assert happened[what] >= 15, happened
    for policy in POLICIES:  # ran out of memory under each
        assert preemptions[policy] >= 8, preemptions
    least = {"shed": 2, "clock jumps": 5, "copies": 15, "swapped in": 15, "drafted": 250}
    least |= {"hit tokens": 400, "steps": 1000}
    for what, count in least.items():
        assert happened[what] >= count, happened


def test_a_world_of_many_requests_holds():
    """The nightly command has ten times as many in each of a thousand."""
    happened = simulate(2, MANY).tally()
    assert happened["requests"] == MANY
    assert happened["steps"] >= MANY // 4, happened
