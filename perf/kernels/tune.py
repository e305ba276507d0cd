"""Choose a kernel's launch configuration on the GPU that is here, and keep it in configs.json.

    python -m millrace.perf.kernels.tune --op paged_attention --key "bfloat16 D128" \\
        --part attention --case "decode b32" --warps 4 8 --stages 2 3 --constant TILE=32,64

Tries every combination on the cases whose name begins so, each in a process of its own (one that
needs too much shared memory costs itself alone), checks its results as the benchmark does, and
writes the fastest. `--op` and `--key` are those that the launcher asks `launch_config` for. A
constant that decides in which order sums are taken decides bits: choose it for a shape, never for a
batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from millrace.kernels.configs import FILE
from millrace.perf.gpu_suite import PARTS
from millrace.perf.isolated import run_isolated
from millrace.perf.kernels.case import OURS, Absent, Case
from millrace.perf.kernels.session import Session, open_device

LIMIT_S = 120.0  # of one candidate
SAME = 0.01  # candidates that differ by less than this do not differ

Row = dict[str, Any]
"""As in configs.json: num_warps, num_stages, constants; measured_us is added."""


def main() -> int:
    options = _options()
    modules = {part.name: part.module for part in PARTS}
    cases = import_module(modules[options.part]).cases
    before = FILE.read_text()
    best: tuple[str, Row] | None = None  # (device, row)
    times = []
    try:
        for candidate in candidates(options.warps, options.stages, options.constant):
            device, time_us, why = _try(candidate, cases, options)
            print(f"{candidate}: " + (why or f"{time_us:.2f} us"), flush=True)
            if not why:
                times.append(time_us)
                if time_us == min(times):
                    best = device, {**candidate, "measured_us": round(time_us, 2)}
    finally:
        FILE.write_text(before)
    if best is None:
        return 1
    if len(times) > 1 and max(times) < (1 + SAME) * min(times):
        print("No candidate differs from the others: does the kernel ask for this op and key?")
    if not options.dry_run:
        FILE.write_text(with_row(before, best[0], options.op, options.key, best[1]))
    print(f"best: {best[1]}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune", description="Launch configurations, measured")
    parser.add_argument("--op", required=True, help="as the launcher says it")
    parser.add_argument("--key", required=True, help="likewise: the shape that a model fixes")
    benches = [part.name for part in PARTS if ".bench_" in part.module]
    parser.add_argument("--part", required=True, choices=benches)
    parser.add_argument("--case", required=True, help="how the names of the cases begin")
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--constant", nargs="*", default=[], metavar="NAME=A,B")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; writes nothing")
    return parser.parse_args()


def candidates(warps: list[int], stages: list[int], constants: list[str]) -> Iterator[Row]:
    """Every combination. A constant is "TILE=32,64"."""
    named = [text.partition("=")[::2] for text in constants]
    values = [[int(value) for value in listed.split(",")] for _, listed in named]
    for num_warps, num_stages, *chosen in product(warps, stages, *values):
        tiles = {name: value for (name, _), value in zip(named, chosen, strict=True)}
        yield {"num_warps": num_warps, "num_stages": num_stages, "constants": tiles}


def with_row(text: str, device: str, op: str, key: str, row: Row) -> str:
    """configs.json with one row more, or another one."""
    devices = json.loads(text)
    devices.setdefault(device, {}).setdefault(op, {})[key] = row
    return json.dumps(devices, indent=1, sort_keys=True) + "\n"


def _try(
    candidate: Row, cases: Callable[..., Iterator[Case]], options: argparse.Namespace
) -> tuple[str, float, str]:
    """(device, mean microseconds of the cases, why there are none)."""
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        why = run_isolated(partial(_measure, candidate, cases, options, answer), LIMIT_S)
        if why:
            return "", 0.0, why
        device, time_us, why = json.loads(answer.read_text())
        return device, time_us, why


def _measure(
    candidate: Row,
    cases: Callable[..., Iterator[Case]],
    options: argparse.Namespace,
    answer: Path,
) -> None:
    """In the candidate's own process: its row is in the file before any kernel asks for it."""
    device = open_device(options.dry_run)
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        FILE.write_text(with_row(FILE.read_text(), name, options.op, options.key, candidate))
    session = Session(device, options.dry_run, 0, time.monotonic() + LIMIT_S, lambda row: None)
    times_us: list[float] = []
    why = f"no case begins with {options.case!r}"
    for case in cases(device, options.dry_run):
        if case.name.startswith(options.case):
            ours = case.providers[OURS]
            timing = ours.reason if isinstance(ours, Absent) else session.checked_timing(case, ours)
            if isinstance(timing, str):
                times_us, why = [], timing
                break
            times_us.append(timing.median_us)
    answer.write_text(json.dumps([name, fmean(times_us or [0.0]), "" if times_us else why]))


if __name__ == "__main__":
    raise SystemExit(main())
