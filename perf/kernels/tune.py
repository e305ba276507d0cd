"""Choose a kernel's launch configuration on the GPU that is here, and keep it in configs.json.

    python -m millrace.perf.kernels.tune --op paged_attention --key "bfloat16 D128" \\
        --part attention --case "decode b32" --warps 4 8 --stages 2 3 --constant TILE=32,64

`tune_all` does this for every row; this is for one, with what you want to try.

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
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from millrace.kernels.configs import FILE
from millrace.perf.gpu_suite import PARTS
from millrace.perf.isolated import run_isolated
from millrace.perf.kernels.case import OURS, Absent, Case
from millrace.perf.kernels.session import Session, open_device
from millrace.perf.kernels.studies import Study

LIMIT_S = 120.0  # of one candidate
SAME = 0.01  # candidates that differ by less than this do not differ

Row = dict[str, Any]
"""As in configs.json: num_warps, num_stages, constants; measured_us is added."""


def main() -> int:
    options = _options()
    study = Study(
        op=options.op,
        key=options.key,
        part=options.part,
        cases=(options.case,),
        warps=options.warps,
        stages=options.stages,
        constants=options.constant,
        kernel=options.kernel,
        provider=options.provider,
    )
    best = tune(study, options.dry_run)
    if best is None:
        return 1
    device, row = best
    if not options.dry_run:
        FILE.write_text(with_row(FILE.read_text(), device, study.op, study.key, row))
    print(f"best: {row}")
    return 0


def tune(study: Study, dry_run: bool) -> tuple[str, Row] | None:
    """(device, the fastest row); None where no candidate was measured. The file is as before."""
    before = FILE.read_text()
    best: tuple[str, Row] | None = None
    times = []
    try:
        for candidate in candidates(study.warps, study.stages, study.constants):
            device, time_us, why = _try(candidate, study, dry_run)
            print(f"{candidate}: " + (why or f"{time_us:.2f} us"), flush=True)
            if not why:
                times.append(time_us)
                if time_us == min(times):
                    best = device, {**candidate, "measured_us": round(time_us, 2)}
    finally:
        FILE.write_text(before)
    if len(times) > 1 and max(times) < (1 + SAME) * min(times):
        print("No candidate differs from the others: does the kernel ask for this op and key?")
    return best


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune", description="Launch configurations, measured")
    parser.add_argument("--op", required=True, help="as the launcher says it")
    parser.add_argument("--key", required=True, help="likewise: the shape that a model fixes")
    benches = [part.name for part in PARTS if ".bench_" in part.module]
    parser.add_argument("--part", required=True, choices=benches)
    parser.add_argument("--case", required=True, help="how the names of the cases begin")
    parser.add_argument("--kernel", default="", help="of the cases; any by default")
    parser.add_argument("--provider", default=OURS, help="which of our forms is timed")
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--constant", nargs="*", default=[], metavar="NAME=A,B")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; writes nothing")
    return parser.parse_args()


def candidates(
    warps: Sequence[int], stages: Sequence[int], constants: Sequence[str]
) -> Iterator[Row]:
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


def cases_of(study: Study, device: torch.device, dry_run: bool) -> Iterator[Case]:
    """The suite's cases that a study is timed on."""
    modules = {part.name: part.module for part in PARTS}
    for case in import_module(modules[study.part]).cases(device, dry_run):
        if (
            case.name.startswith(study.cases)
            and study.kernel in ("", case.kernel)
            and study.provider in case.providers
        ):
            yield case


def _try(candidate: Row, study: Study, dry_run: bool) -> tuple[str, float, str]:
    """(device, mean microseconds of the cases, why there are none)."""
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        why = run_isolated(partial(_measure, candidate, study, dry_run, answer), LIMIT_S)
        if why:
            return "", 0.0, why
        device, time_us, why = json.loads(answer.read_text())
        return device, time_us, why


def _measure(candidate: Row, study: Study, dry_run: bool, answer: Path) -> None:
    """In the candidate's own process: its row is in the file before any kernel asks for it.

    The mean is geometric: a microsecond of a short case is worth as many of its parts.
    """
    device = open_device(dry_run)
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        FILE.write_text(with_row(FILE.read_text(), name, study.op, study.key, candidate))
    session = Session(device, dry_run, 0, time.monotonic() + LIMIT_S, lambda row: None)
    times_us: list[float] = []
    why = f"no case begins with {' or '.join(map(repr, study.cases))}"
    why += f" and has {study.provider!r}"
    for case in cases_of(study, device, dry_run):
        ours = case.providers[study.provider]
        timing = ours.reason if isinstance(ours, Absent) else session.checked_timing(case, ours)
        if isinstance(timing, str):
            times_us, why = [], timing
            break
        times_us.append(timing.median_us)
    time_us = geometric_mean(times_us) if times_us else 0.0
    answer.write_text(json.dumps([name, time_us, "" if times_us else why]))


if __name__ == "__main__":
    raise SystemExit(main())
