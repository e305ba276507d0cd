"""Run simulated worlds, seed by seed; at the first that fails, show its last steps.

python -m millrace.perf.sim --seeds 10000
python -m millrace.perf.sim --seed 4711           # that one alone, with a log of all its steps
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from random import Random

from millrace.perf.sim.world import World

LAST_STEPS = 12  # shown of a world that failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--seed", type=int, help="run this world alone, and show every step")
    args = parser.parse_args()
    if args.seed is not None:
        sys.exit(0 if run(args.seed, shown_steps=None) else 1)
    began, end = time.monotonic(), args.first + args.seeds
    for seed in range(args.first, end):
        if not run(seed, shown_steps=0):
            run(seed, shown_steps=LAST_STEPS)
            sys.exit(f"seed {seed} fails; all its steps: python -m millrace.perf.sim --seed {seed}")
    print(f"{args.seeds} worlds in {time.monotonic() - began:.1f} s, none failed")


def run(seed: int, shown_steps: int | None) -> bool:
    """Whether the world of a seed holds; shows its last events (None: all) and what was amiss."""
    world = World(Random(seed))
    failure = None
    try:
        world.run()
    except Exception as error:
        failure = error
    if shown_steps != 0:
        print(f"seed {seed}: {world.scenario}")
        for line in world.log[-shown_steps:] if shown_steps else world.log:
            print(line)
        if failure is not None:
            traceback.print_exception(failure, limit=-1)
    return failure is None


if __name__ == "__main__":
    main()
