"""Run simulated worlds, seed by seed; at the first that fails, show its last steps.

python -m millrace.perf.sim --seeds 10000
python -m millrace.perf.sim --seeds 1000 --requests 10000 --jobs 16    # for a night
python -m millrace.perf.sim --seed 4711           # that one alone, with a log of all its steps
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from random import Random

from millrace.perf.sim.world import MAX_REQUESTS, World

LAST_STEPS = 12  # shown of a world that failed
SEEDS_A_TASK = 20  # of a process, where worlds are small
MINUTE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--seed", type=int, help="run this world alone, and show every step")
    parser.add_argument(
        "--requests",
        type=int,
        default=MAX_REQUESTS,
        help=f"in each world at most, from 1000 on exactly so many (default {MAX_REQUESTS})",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args()
    if args.seed is not None:
        sys.exit(0 if run(args.seed, args.requests, shown_steps=None) else 1)
    began, happened = time.monotonic(), Counter[str]()
    seeds = range(args.first, args.first + args.seeds)
    with outcomes(seeds, args.requests, args.jobs) as worlds:
        for seed, outcome in zip(seeds, worlds, strict=True):
            if outcome is None:
                run(seed, args.requests, shown_steps=LAST_STEPS)
                again = f"--seed {seed} --requests {args.requests}"
                sys.exit(f"seed {seed} fails; all its steps: python -m millrace.perf.sim {again}")
            happened += outcome
            if sys.stderr.isatty():
                print(f"\rseed {seed}", end="", file=sys.stderr)
    minutes = (time.monotonic() - began) / MINUTE_S
    print(f"{args.seeds} worlds in {minutes:.1f} min, none failed: {dict(happened)}")


@contextmanager
def outcomes(seeds: range, requests: int, jobs: int) -> Iterator[Iterator[Counter[str] | None]]:
    """What happened in the world of each seed, in their order; None: it failed."""
    simulate = partial(outcome_of, requests=requests)
    if jobs == 1:
        yield map(simulate, seeds)
        return
    with ProcessPoolExecutor(jobs, initializer=os.nice, initargs=(1,)) as pool:
        many = requests > MAX_REQUESTS
        try:
            yield pool.map(simulate, seeds, chunksize=1 if many else SEEDS_A_TASK)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def outcome_of(seed: int, requests: int) -> Counter[str] | None:
    """Run the world of a seed."""
    world = World(Random(seed), requests)
    try:
        world.run()
    except Exception:
        return None
    return world.tally()


def run(seed: int, requests: int, shown_steps: int | None) -> bool:
    """Whether the world of a seed holds; shows its last events (None: all) and what was amiss."""
    world = World(Random(seed), requests)
    failure = None
    try:
        world.run()
    except Exception as error:
        failure = error
    print(f"seed {seed}: {world.scenario}")
    for line in world.log if shown_steps is None else world.log[-shown_steps:]:
        print(line)
    if failure is not None:
        traceback.print_exception(failure, limit=-1)
    return failure is None


if __name__ == "__main__":
    main()
