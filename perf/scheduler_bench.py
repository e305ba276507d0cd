"""What the scheduler costs the host, without a model; beside vLLM's and nano-vllm's.

    python -m millrace.perf.scheduler_bench [--json FILE] [--plots FOLDER] [--nano-path CHECKOUT]

The device is a fabricated answer that costs nothing and is not timed. The machine's speed is in
every figure: compare ratios of one run, in which each figure is taken of all schedulers in turn.
vLLM's is measured where `vllm` can be imported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from millrace.perf.environment import environment
from millrace.perf.peers import nano_scheduler, vllm_scheduler
from millrace.perf.plot import Axis, line_chart
from millrace.perf.scheduler_costs import (
    cancel_waiting,
    comes_or_goes,
    index_long_prompt,
    look_up_long_prompt,
    prompt_comes,
    steady_step,
    yardstick,
)
from millrace.perf.scheduler_driver import MakeDriver, MillraceDriver

RUNNING = (1, 64, 256, 1024, 4096)
WAITING = (1, 10, 100, 1000, 10_000)
PROMPTS = (256, 1024, 4096, 16_384, 65_536)
OURS, VLLM, NANO = "Millrace", "vLLM", "nano-vllm"
Microseconds = dict[str, dict[str, float]]  # by case and scheduler
MICROSECONDS = Axis(1.0, 1e6, tuple(10.0**n for n in range(7)), lambda us: f"{us:,.0f} us")


@dataclass(frozen=True, slots=True)
class Case:
    """A line of the table. `others`: the peers that can do it."""

    name: str
    measure: Callable[[MakeDriver], float]  # microseconds
    others: tuple[str, ...] = ()
    goal_us: float | None = None
    goal_ratio: float | None = None  # of vLLM's time and ours


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot, and its cases by what they differ in."""

    name: str
    title: str
    x_label: str
    cases: dict[int, Case]


def curves() -> list[Curve]:
    goals: dict[int, tuple[float, float]] = {256: (25.0, 100.0), 4096: (100.0, 750.0)}
    running = {
        n: Case(
            f"step, {n} decode",
            partial(steady_step, running=n),
            (VLLM, NANO),
            *goals.get(n, (None, None)),
        )
        for n in RUNNING
    }
    waiting = {
        n: Case(
            f"step, 256 decode, {n} wait", partial(steady_step, running=256, waiting=n), (VLLM,)
        )
        for n in WAITING
    }
    prompts = {
        n: Case(f"a prompt of {n} comes", partial(prompt_comes, length=n), (VLLM, NANO))
        for n in PROMPTS
    }
    return [
        Curve("running", "A step in which all decode", "requests that run", running),
        Curve("waiting", "A step of 256 decodes while others wait", "requests that wait", waiting),
        Curve("prompt", "From submission to the first token", "tokens of the prompt", prompts),
    ]


def other_cases() -> list[Case]:
    comes, goes = partial(comes_or_goes, does_come=True), partial(comes_or_goes, does_come=False)
    return [
        Case("admit 1k tokens", comes, (VLLM,), 60.0),
        Case("release 1k tokens", goes, (VLLM,), 60.0),
        Case("index 100k tokens", index_long_prompt, goal_us=3000.0),
        Case("look up 100k tokens", look_up_long_prompt, goal_us=300.0),
        Case("yardstick: 6250 dict insertions", yardstick),
        Case("cancel one of 100 waiting", partial(cancel_waiting, waiting=100), (VLLM,)),
        Case("cancel one of 10000 waiting", partial(cancel_waiting, waiting=10_000), (VLLM,)),
    ]


def measure(cases: list[Case], peers: dict[str, MakeDriver]) -> Microseconds:
    """Each case of ours, and right after it of the peers that can do it."""
    return {
        case.name: {OURS: case.measure(MillraceDriver)}
        | {name: case.measure(peers[name]) for name in case.others if name in peers}
        for case in cases
    }


def plot(curve: Curve, found: Microseconds) -> str:
    """Microseconds of each scheduler, as an SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for x, case in curve.cases.items():
        for name, us in found[case.name].items():
            series.setdefault(name, []).append((x, us))
    return line_chart(curve.title, curve.x_label, series, axis=MICROSECONDS)


def table(cases: list[Case], found: Microseconds) -> Table:
    shown = Table("microseconds", box=box.SIMPLE)
    for heading in (OURS, "goal", VLLM, "ratio", "goal", NANO, "ratio"):
        shown.add_column(heading, justify="right")
    for case in cases:
        us = found[case.name]
        cells = [us[OURS], case.goal_us]
        cells += [us.get(VLLM), us[VLLM] / us[OURS] if VLLM in us else None, case.goal_ratio]
        cells += [us.get(NANO), us[NANO] / us[OURS] if NANO in us else None]
        shown.add_row(case.name, *("" if cell is None else f"{cell:,.1f}" for cell in cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plots", type=Path, help="folder for the curves, as SVG")
    parser.add_argument("--nano-path", type=Path, help="a checkout of nano-vllm")
    args = parser.parse_args()
    found_at = environment(seed=0)
    loaded = {VLLM: vllm_scheduler.load(), NANO: nano_scheduler.load(args.nano_path)}
    peers = {name: make for name, make in loaded.items() if not isinstance(make, str)}
    left_out = {name: reason for name, reason in loaded.items() if isinstance(reason, str)}
    drawn = curves()
    cases = [case for curve in drawn for case in curve.cases.values()] + other_cases()
    found = measure(cases, peers)
    Console(width=110).print(table(cases, found))
    for name, reason in left_out.items():
        print(f"{name} is {reason}")
    if args.json is not None:
        goals = {case.name: case.goal_us for case in cases if case.goal_us is not None}
        result = {"environment": found_at, "goals_us": goals, "us": found, "left_out": left_out}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for curve in drawn if args.plots is not None else ():
        (args.plots / f"scheduler-bench-{curve.name}.svg").write_text(plot(curve, found))


if __name__ == "__main__":
    main()
