"""MAX_ROWS from measured times: what is served by which form, and what the kernels then read."""

import json

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels import configs
from millrace.kernels.fused_model import NOT_MEASURED, fuse
from millrace.kernels.linear_choice import LinearChoice, choose_linear
from millrace.kernels.matmul_plan import decode_config
from millrace.perf.kernels import bench_head
from millrace.perf.kernels.bench_matmul import GEMV, VENDOR
from millrace.perf.kernels.case import OURS
from millrace.perf.kernels.tune import with_row
from millrace.perf.kernels.tune_rows import chosen

N, K, KEY = 256, 512, "bfloat16 N256 K512"


def rows_of(times, kernel="matmul", case="layer"):
    """times: {rows: {provider: microseconds, None where there is no time}}."""
    return [
        {
            "kernel": kernel,
            "case": f"{case}, {rows} rows",
            "provider": name,
            "median_us": us,
            "axes": {"rows": rows, "n": N, "k": K},
        }
        for rows, providers in times.items()
        for name, us in providers.items()
    ]


def max_rows(times, **options):
    rows = rows_of(times, **options)
    return {op: row["constants"]["MAX_ROWS"] for op, _, row in chosen(rows, {})}


def at(decode, vendor, gemv=None):
    return {OURS: decode, VENDOR: vendor} | ({} if gemv is None else {GEMV: gemv})


@pytest.mark.parametrize(
    ("times", "gemv", "decode"),
    [
        ({1: at(5, 9, 4), 2: at(5, 9, 6), 16: at(5, 9), 64: at(9, 8)}, 1, 16),
        ({1: at(9, 8, 7), 2: at(9, 8, 7), 4: at(7, 8, 9), 16: at(9, 8)}, 2, 4),
        ({1: at(9, 8, 8.5), 16: at(5, 9)}, 0, 0),
        ({1: at(5, 9, 9), 16: at(9, 8), 64: at(5, 9)}, 0, 1),
        ({1: at(None, 9, None), 16: at(5, 9)}, 0, 0),
        ({1: at(5, None, 9)}, 0, 0),
    ],
    ids=["both", "gemv first", "library first", "a gap", "a failed form", "no library"],
)
def test_a_form_serves_the_counts_up_to_the_first_that_it_loses(times, gemv, decode):
    assert max_rows(times) == {"linear_gemv": gemv, "linear_decode": decode}


def test_the_draw_has_to_beat_every_product_with_the_sampler():
    times = {1: {OURS: 5, "a": 6, "b": 7}, 4: {OURS: 5, "a": 6, "b": 5}}
    assert max_rows(times, kernel=bench_head.KERNEL) == {"lm_head_draw": 1}


def test_fused_layers_do_not_choose():
    rows = rows_of({1: at(5, 9)}) + [
        {**row, "case": "layer, 1 rows, fused"} for row in rows_of({1: at(9, 5)})
    ]
    assert [row["constants"]["MAX_ROWS"] for _, _, row in chosen(rows, {})] == [0, 1]


def test_what_was_tuned_stays_and_the_kernels_read_the_choice(tmp_path, monkeypatch):
    tuned = {"num_warps": 8, "num_stages": 2, "measured_us": 1.0}
    tuned["constants"] = {"BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 1, "PDL": 1, "TMA": 0}
    text = with_row("{}", "NVIDIA H200", "linear_decode", KEY, tuned)
    times = {1: at(5, 9, 4), 16: at(5.123, 9), 64: at(9, 8)}
    drawn = rows_of({1: at(5, 9), 4: at(5, 9), 16: at(9, 5)}, kernel=bench_head.KERNEL)
    table = json.loads(text)["NVIDIA H200"]
    for op, key, row in chosen(rows_of(times) + drawn, table):
        text = with_row(text, "NVIDIA H200", op, key, row)
    written = json.loads(text)["NVIDIA H200"]
    assert written["linear_decode"][KEY]["constants"] == {**tuned["constants"], "MAX_ROWS": 16}
    assert written["linear_decode"][KEY]["measured_us"] == 5.12
    file = tmp_path / "configs.json"
    file.write_text(text)

    def read(op, key, device, default):
        row = json.loads(file.read_text())["NVIDIA H200"].get(op, {}).get(key)
        if row is None:
            return default
        return configs.LaunchConfig(row["num_warps"], row["num_stages"], row["constants"])

    for module in ("gemv_triton", "matmul_plan", "fused_model"):
        monkeypatch.setattr(f"millrace.kernels.{module}.launch_config", read)
    weight = torch.empty(N, K, dtype=torch.bfloat16)
    assert choose_linear(weight) == LinearChoice(gemv_rows=1, decode_rows=16, persistent=False)
    assert decode_config(weight).num_warps == 8
    model = fuse([weight], weight)
    assert (model.linears[0].triton_rows, model.head.draw_rows) == (16, 4)


def test_what_the_model_falls_back_to_is_the_key_that_is_written():
    (row,) = chosen(rows_of({1: {OURS: 5, "a": 6}}, kernel=bench_head.KERNEL), {})
    assert row[:2] == ("lm_head_draw", KEY)
    assert NOT_MEASURED.constants.keys() <= row[2]["constants"].keys()
