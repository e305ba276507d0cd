"""Which rows of x each form of a linear layer serves, from what the suite measured on this GPU.

    make gpu-suite ARGS="--only matmul"
    python -m millrace.perf.kernels.tune_rows build/gpu_suite/matmul.json

writes MAX_ROWS into the rows of configs.json that `linear_choice.py` (linear_gemv, linear_decode)
and `fused_model.py` (lm_head_draw) read, for the device and the weights of matmul.json; what `tune`
chose in such a row stays. A form serves the counts of rows, from one up, with which it was fastest:

    linear_gemv      faster than the decode product and cuBLAS
    linear_decode    it, or the GEMV where that serves, faster than cuBLAS
    lm_head_draw     faster than a product and the sampler, whoever made the product

A count at which a form was not measured ends its run. Layers are taken without what is folded in:
that is less work for our forms than for the library and torch's operations after it, so a table
made this way errs on the library's side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.configs import FILE, LaunchConfig
from millrace.kernels.gemv_triton import gemv_config
from millrace.kernels.matmul_plan import decode_config, weight_key
from millrace.perf.kernels import bench_head, bench_matmul
from millrace.perf.kernels.case import OURS
from millrace.perf.kernels.tune import Row, with_row
from millrace.perf.results import load

Times = Mapping[int, Mapping[str, float]]
"""Rows of x -> provider -> microseconds."""


def main() -> int:
    options = _options()
    write(options.results, options.file)
    return 0


def write(results: Path, file: Path) -> None:
    """MAX_ROWS into `file` from the suite's matmul.json; SystemExit where that is not there."""
    found = load(results.parent, results.stem)
    if found is None:
        raise SystemExit(f"{results}: there is no such file")
    text, device = file.read_text(), str(found.environment["device"])
    for op, key, row in chosen(found.rows, json.loads(text).get(device, {})):
        text = with_row(text, device, op, key, row)
        print(f"{device}: {op} {key}: up to {row['constants']['MAX_ROWS']} rows")
    file.write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_rows", description="MAX_ROWS, as measured")
    parser.add_argument("results", type=Path, help="matmul.json of the GPU suite")
    parser.add_argument("--file", type=Path, default=FILE, help="the table to write into")
    return parser.parse_args()


def chosen(
    rows: Sequence[Mapping[str, Any]], table: Mapping[str, Mapping[str, Row]]
) -> Iterator[tuple[str, str, Row]]:
    """(op, key, row) for each weight in the suite's rows; `table` is the device's, as it was."""
    gemv, vendor = bench_matmul.GEMV, bench_matmul.VENDOR
    for (n, k), times in _times_of(rows, "matmul").items():
        weight = torch.empty(n, k, dtype=bench_matmul.DTYPE, device="meta")
        by_gemv = [count for count in times if _beats(times[count], gemv)]
        gemv_rows = _served(times, by_gemv)
        by_decode = [count for count in times if _beats(times[count], OURS, [vendor])]
        decode_rows = _served(times, [*(n for n in by_gemv if n <= gemv_rows), *by_decode])
        yield _row("linear_gemv", weight, gemv_config(weight), gemv_rows, times, gemv, table)
        yield _row("linear_decode", weight, decode_config(weight), decode_rows, times, OURS, table)
    for (n, k), times in _times_of(rows, bench_head.KERNEL).items():
        weight = torch.empty(n, k, dtype=bench_matmul.DTYPE, device="meta")
        rows_drawn = _served(times, [count for count in times if _beats(times[count], OURS)])
        yield _row("lm_head_draw", weight, decode_config(weight), rows_drawn, times, OURS, table)


def _times_of(rows: Sequence[Mapping[str, Any]], kernel: str) -> dict[tuple[int, int], Times]:
    """(N, K) -> times, counts of rows in ascending order; without layers that fold something in."""
    found: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["axes"]["rows"]):
        if row["kernel"] == kernel and not row["case"].endswith("fused") and row["median_us"]:
            axes = row["axes"]
            times = found.setdefault((axes["n"], axes["k"]), {})
            times.setdefault(axes["rows"], {})[row["provider"]] = row["median_us"]
    return dict(found)


def _beats(times: Mapping[str, float], form: str, others: Sequence[str] | None = None) -> bool:
    """Whether it was measured, and faster than each of the others: all, where none are named."""
    against = [name for name in times if name != form] if others is None else others
    measured = form in times and all(name in times for name in against)
    return measured and all(times[form] < times[name] for name in against)


def _served(times: Times, good: Sequence[int]) -> int:
    """The last of the measured counts up to which all are good; 0 where the first is not."""
    served = 0
    for count in times:
        if count not in good:
            break
        served = count
    return served


def _row(
    op: str,
    weight: Tensor,
    default: LaunchConfig,
    max_rows: int,
    times: Times,
    form: str,
    table: Mapping[str, Mapping[str, Row]],
) -> tuple[str, str, Row]:
    """The row as it was tuned, or the default's, with MAX_ROWS and the time at so many rows."""
    key = weight_key(weight)
    row = table.get(op, {}).get(key) or {
        "num_warps": default.num_warps,
        "num_stages": default.num_stages,
        "constants": dict(default.constants),
    }
    at = times[max_rows or next(iter(times))]
    measured_us = round(at.get(form, 0.0), 2)
    constants = {**row["constants"], "MAX_ROWS": max_rows}
    return op, key, {**row, "constants": constants, "measured_us": measured_us}


if __name__ == "__main__":
    raise SystemExit(main())
