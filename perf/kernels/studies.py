"""What is tried for each row of configs.json, and on which cases of the suite it is timed.

Every operation that asks `launch_config` for a row has studies here, for the shapes that the suite
measures: the layers of Llama 1B, 8B and 70B / 8. `lm_head_draw` alone has none: it is launched as
the decode product of its weight, and its MAX_ROWS is `tune_rows.py`'s. `tune.py` runs one study,
`tune_all.py` all of them.

A combination of values that does not compile, or fails its check, costs itself alone. What decides
the order of a sum (SPLITS) is tried beside what the plan says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from millrace.kernels.matmul_plan import MAX_SPLITS, plan, weight_key
from millrace.perf.kernels import bench_activation, bench_matmul, bench_norm
from millrace.perf.kernels.case import OURS

ATTENTION_CASES = {  # by head dimension
    64: ("decode D64 ",),
    96: ("decode D96 ",),
    128: ("prefill c8192", "decode b1 c4096", "decode b32 c4096", "decode b128 c4096"),
    256: ("decode D256 ", "decode window "),
}
APPEND_CASES = {64: ("Llama 1B,",), 128: ("Llama 8B,", "Qwen3 8B,")}


@dataclass(frozen=True, slots=True)
class Study:
    """A row of configs.json, by the op and key that the launcher asks for; every combination."""

    op: str
    key: str
    part: str  # of the suite
    cases: tuple[str, ...]  # how the names of its cases begin
    warps: Sequence[int]
    stages: Sequence[int]
    constants: Sequence[str]  # "TILE=32,64"
    kernel: str = ""  # of the cases; any, where empty
    provider: str = OURS


def studies() -> Iterator[Study]:
    """All of them; a layer's decode product before its prefill product, which takes its splits."""
    for head_dim, names in ATTENTION_CASES.items():
        tiles = ["TILE=32,64"] + ["BLOCK_M=64,128"] * any("prefill" in name for name in names)
        key = f"bfloat16 D{head_dim}"
        yield Study("paged_attention", key, "attention", names, [4, 8], [2, 3], tiles)
    for head_dim, names in APPEND_CASES.items():
        tiles = ["Q_TILE=8,16,32", "KV_TILE=4,8"]
        yield Study("kv_append", f"D{head_dim}", "kv_append", names, [1, 2, 4], [1], tiles)
    for hidden in bench_norm.HIDDEN:
        names = (f"{bench_norm.TOKENS} x {hidden} ",)
        yield Study("norm", f"E{hidden}", "norm", names, [4, 8, 16], [1], ["ROWS=1,2"])
    for width in bench_activation.WIDTHS:
        names, tiles = (f"{bench_activation.TOKENS} x {width} ",), ["TILE=1024,2048,4096"]
        yield Study("activation", f"F{width}", "activation", names, [2, 4, 8], [1], tiles)
    for layer in bench_matmul.LAYERS:
        yield from _products(layer)


def _products(layer: str) -> Iterator[Study]:
    """The forms of a linear layer."""
    n, k = bench_matmul.LAYERS[layer]
    key = weight_key(torch.empty(n, k, dtype=bench_matmul.DTYPE, device="meta"))
    names, splits = (f"{layer} {n} x {k},",), plan(n, k).splits
    near = sorted({max(1, splits - 1), splits, min(MAX_SPLITS, splits + 1)})
    tried = ["SPLITS=" + ",".join(map(str, near)), "TMA=0,1"]
    yield Study("linear_decode", key, "matmul", names, [4], [3, 4], tried, "matmul")
    gemv, tried = bench_matmul.GEMV, ["BLOCK_N=2,4,8", "UNROLL=1,2,4"]
    yield Study("linear_gemv", key, "matmul", names, [4], [1], tried, "matmul", gemv)
    if layer in bench_matmul.PREFILL_LAYERS:
        kernel, tried = bench_matmul.PREFILL, ["BLOCK_N=64,128", "BLOCK_T=128,256", "TMA=0,1"]
        yield Study("linear_persistent", key, "matmul", names, [8], [3, 4], tried, kernel)
