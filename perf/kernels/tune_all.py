"""Fill configs.json for the GPU that is here, after the suite has run: every row that is asked for.

    make gpu-suite
    python -m millrace.perf.kernels.tune_all build/gpu_suite

runs each study of `studies.py` whose row is not there yet, so that it can be stopped and called
again; measures the linear layers once more, with the tiles that were chosen; and writes from those
times which rows of x each form serves (`tune_rows.py`). `--only OP ...` names operations; `--again`
measures rows that are there as well. `--dry-run` goes the same way on a CPU: it says what would be
tried, tries one candidate for an operation on a tiny case, and writes into a copy of the table
beside the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from millrace.kernels.configs import FILE
from millrace.perf.kernels import tune_rows
from millrace.perf.kernels.studies import Study, studies
from millrace.perf.kernels.tune import candidates, cases_of, tune, with_row
from millrace.perf.results import load

MATMUL = "matmul"  # the part whose times choose rows


def main() -> int:
    options = _options()
    todo = [study for study in studies() if not options.only or study.op in options.only]
    table = FILE
    if options.dry_run:
        table, todo = options.results / FILE.name, _tiny(todo)
        options.results.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILE, table)
    done = json.loads(table.read_text()).get(_device(options.results), {})
    for study in todo:
        if options.again or study.key not in done.get(study.op, {}):
            _run(study, options.dry_run)
    if any(study.part == MATMUL for study in todo):
        _measure_products(options.results, options.dry_run)
        tune_rows.write(options.results / f"{MATMUL}.json", table)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_all", description="All of configs.json, measured")
    parser.add_argument("results", type=Path, help="folder of the GPU suite")
    ops = sorted({study.op for study in studies()})
    parser.add_argument("--only", nargs="+", choices=ops, metavar="OP")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; the table stays")
    return parser.parse_args()


def _device(results: Path) -> str:
    """As the suite named it: this process must not touch the device, its children do."""
    found = load(results, MATMUL)
    return "" if found is None else str(found.environment["device"])


def _tiny(todo: Sequence[Study]) -> list[Study]:
    """Says how much each study tries; returns the first of each op, with one candidate."""
    first: dict[str, Study] = {}
    for study in todo:
        tried = len([*candidates(study.warps, study.stages, study.constants)])
        cases = len([*cases_of(study, torch.device("cpu"), dry_run=False)])
        print(f"{study.op} {study.key}: {tried} candidates on {cases} cases")
        constants = [text.partition(",")[0] for text in study.constants]
        one = replace(study, warps=study.warps[:1], stages=study.stages[:1], constants=constants)
        name = next(cases_of(replace(one, cases=("",)), torch.device("cpu"), dry_run=True)).name
        first.setdefault(study.op, replace(one, cases=(name,)))
    return list(first.values())


def _run(study: Study, dry_run: bool) -> None:
    print(f"{study.op} {study.key}", flush=True)
    best = tune(study, dry_run)
    if best is not None and not dry_run:
        device, row = best
        FILE.write_text(with_row(FILE.read_text(), device, study.op, study.key, row))


def _measure_products(results: Path, dry_run: bool) -> None:
    command = [sys.executable, "-P", "-m", "millrace.perf.gpu_suite", "--out", str(results)]
    subprocess.run([*command, "--only", MATMUL, *(["--dry-run"] if dry_run else [])], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
