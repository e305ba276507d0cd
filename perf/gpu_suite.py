"""Everything that needs a GPU, in one command of under eight minutes.

    python -m millrace.perf.gpu_suite --out DIR [--only PART ...] [--dry-run]

First the correctness tests, then the ceilings of the device, each kernel's benchmark, and the
engine end to end on models of published shapes. Every part runs in a process of its own and writes
DIR/<part>.json row by row; a part that crashes or overruns costs itself alone, and `--only` runs it
again into the same folder. DIR/summary.md and the plots are made of whatever files are there. The
ceilings are measured in each run that needs them: a share compares two figures of one run.

`--dry-run` proves the same path without a GPU: tiny shapes, Triton's interpreter, no speeds.
Exits with 1 if a part failed. sh perf/gpu_suite.sh does the same from a checkout that is not
installed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from millrace.perf.environment import environment
from millrace.perf.gpu import device_facts
from millrace.perf.isolated import run_isolated, run_together
from millrace.perf.kernels.ceilings import from_rows
from millrace.perf.kernels.session import Session, Skip, open_device
from millrace.perf.results import PartResult, load, path_of
from millrace.perf.summary import write_summary

TOTAL_S = 450.0
MOST_COMPILERS = 8
GRACE_S = 20.0  # for a part to end its last measurement after its time


@dataclass(frozen=True, slots=True)
class Part:
    """`module` has a function `entry(session)`."""

    name: str
    module: str
    budget_s: float
    needs_ceilings: bool = True
    compile_s: float = 0.0  # first compile its kernels in several processes, for at most so long
    entry: str = "run"


CEILINGS = Part("ceilings", "millrace.perf.kernels.ceilings", 20, needs_ceilings=False)
PARTS = (  # the budgets together are no more than TOTAL_S: no part lives on another's time
    Part("correctness", "millrace.perf.kernels.correctness", 63, needs_ceilings=False),
    CEILINGS,
    Part("boundary", "millrace.perf.kernels.bench_boundary", 12),
    Part("attention", "millrace.perf.kernels.bench_attention", 42, compile_s=16),
    Part("sampling", "millrace.perf.kernels.bench_sampling", 23),
    Part("kv_append", "millrace.perf.kernels.bench_kv_append", 9),
    Part("norm", "millrace.perf.kernels.bench_norm", 7),
    Part("activation", "millrace.perf.kernels.bench_activation", 7),
    Part("matmul", "millrace.perf.kernels.bench_matmul", 36, compile_s=16),
    Part("exactness", "millrace.perf.e2e.exactness", 17, needs_ceilings=False),
    Part("e2e-8b", "millrace.perf.e2e.models", 56, entry="run_8b"),
    Part("e2e-1b", "millrace.perf.e2e.models", 35, entry="run_1b"),
    Part("deterministic", "millrace.perf.e2e.deterministic", 27, needs_ceilings=False),
    Part("start", "millrace.perf.e2e.start", 50, needs_ceilings=False),
    Part("serve", "millrace.perf.e2e.serve", 14, needs_ceilings=False),
)


def main() -> int:
    options = _options()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, with the parts
    options.out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + TOTAL_S
    results = [_run_part(part, options, ends_at) for part in _chosen(options.only)]
    write_summary(options.out, [part.name for part in PARTS])
    failed = [result.part for result in results if result.status == "failed"]
    print(f"{options.out / 'summary.md'}: " + (f"FAILED: {', '.join(failed)}" if failed else "ok"))
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="gpu_suite", description="Tests and benchmarks on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: tiny shapes, no speeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what is measured, where the copy is no git checkout")
    return parser.parse_args()


def _chosen(names: Iterable[str]) -> list[Part]:
    """The parts to run, in order, with the ceilings if one needs them."""
    chosen = [part for part in PARTS if part.name in names]
    if any(part.needs_ceilings for part in chosen):
        chosen = [part for part in PARTS if part in chosen or part is CEILINGS]
    return chosen


def _run_part(part: Part, options: argparse.Namespace, ends_at: float) -> PartResult:
    """Run one part; afterwards its file is there and says how it ended."""
    print(f"== {part.name}", flush=True)
    path_of(options.out, part.name).unlink(missing_ok=True)
    found_at = environment(options.seed)
    if options.commit:
        found_at["commit"] = options.commit
    empty = PartResult(options.out, part.name, found_at)
    try:
        run = getattr(import_module(part.module), part.entry)
    except ModuleNotFoundError as error:
        empty.finish("skipped", f"needs {error.name}")
    except Exception as error:
        empty.finish("failed", _first_line(error))
    else:
        if part.compile_s and not options.dry_run:
            print("compiling", flush=True)
            run_isolated(partial(_compile, run, options), part.compile_s)
        budget_s = min(part.budget_s, ends_at - time.monotonic())
        if budget_s > 0:
            work = partial(_work, part, run, options, empty, budget_s)
            why = run_isolated(work, budget_s + GRACE_S)
            _note_end(load(options.out, part.name) or empty, why)
        else:
            empty.finish("cut", "no time left")
    result = load(options.out, part.name)
    assert result is not None, "written by whoever ended it"
    print(f"== {part.name}: {result.status} after {result.seconds:.0f} s {result.note}", flush=True)
    return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _note_end(result: PartResult, why: str) -> None:
    """A part that ended before it said so: "" where it came to its own end."""
    if result.status == "running":
        result.finish("cut" if why.startswith("killed") else "failed", why)


def _compile(run: Callable[[Session], None], options: argparse.Namespace) -> None:
    """In a process of its own, which starts others: fill Triton's cache with a part's kernels."""
    count = max(1, min(MOST_COMPILERS, len(os.sched_getaffinity(0)) // 2))

    def compile_share(i: int) -> None:
        device, never = open_device(options.dry_run), float("inf")
        run(Session(device, options.dry_run, options.seed, never, print, compiles=(i, count)))

    run_together([partial(compile_share, i) for i in range(count)])


def _work(
    part: Part,
    run: Callable[[Session], None],
    options: argparse.Namespace,
    result: PartResult,
    budget_s: float,
) -> None:
    """In the part's own process."""
    deadline = time.monotonic() + budget_s
    try:
        device = open_device(options.dry_run)
        result.environment |= device_facts(device)
        ceilings = None
        if part.needs_ceilings:
            measured = load(options.out, CEILINGS.name)
            ceilings = from_rows(measured.rows if measured else [])
            result.environment |= {
                "copy_bytes_per_s": ceilings.copy_bytes_per_s,
                "matmul_flops_per_s": ceilings.matmul_flops_per_s,
            }
        session = Session(
            *(device, options.dry_run, options.seed, deadline, result.record, ceilings),
            folder=options.out,
        )
        run(session)
    except Skip as reason:
        result.finish("skipped", str(reason))
    except Exception as error:
        result.finish("failed", _first_line(error))
        raise
    else:
        result.finish("cut" if session.cut else "done")


if __name__ == "__main__":
    raise SystemExit(main())
