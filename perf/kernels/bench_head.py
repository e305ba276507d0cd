"""Hidden rows to tokens: the last layer and the draw in one kernel, and one after the other.

x [R, K], head [V, K] in bf16, every row at temperature 1. Bytes: (V K + R K) e, head and x once.
One after the other writes the logits and reads them again, 4 R V bytes more, and launches more
kernels; the draw in one makes its noise beside the products. `lm_head.py` says why both pick the
same token, which is what the check compares, bit for bit: numbers are eighths of small integers,
whose sums of products are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.lm_head import draw_from_hidden_reference
from millrace.kernels.lm_head_triton import draw_from_hidden
from millrace.kernels.matmul_triton import Workspace, linear_decode
from millrace.kernels.sampling import SampledTokens
from millrace.kernels.sampling_triton import sample_triton
from millrace.kernels.slot_sampling import SlotSampling, SlotValues
from millrace.perf.kernels.case import OURS, Call, Case, Outputs, Prepare, Provider, close_to

KERNEL = "lm head draw"
HEADS = {"1B": (128256, 2048), "8B": (128256, 4096)}  # (V, K)
ROWS, SMALL_ROWS = (1, 4, 16, 64), 5
DRY_HEADS, DRY_ROWS = {"tiny": (40, 64)}, (2,)
DTYPE, DRY_DTYPE = torch.bfloat16, torch.float16  # the interpreter rounds to bf16 otherwise
GOAL = 0.93
EIGHTHS = 8

Draw = Callable[["Inputs"], SampledTokens]


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    head: Tensor
    slots: Tensor
    params: SlotSampling
    workspace: Workspace


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    for rows in DRY_ROWS if dry_run else ROWS:
        for name, shape in (DRY_HEADS if dry_run else HEADS).items():
            yield _case(name, shape, rows, device, DRY_DTYPE if dry_run else DTYPE)


def _case(
    name: str, shape: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype
) -> Case:
    vocab, k = shape
    make = partial(_inputs, vocab, k, dtype, device)
    return Case(
        kernel=KERNEL,
        name=f"{name} head {vocab} x {k}, {rows} rows",
        bytes=(vocab + rows) * k * dtype.itemsize,
        flops=2 * rows * vocab * k,
        bound="memory",
        goal=GOAL,
        make=partial(make, rows),
        make_small=partial(make, min(rows, SMALL_ROWS)),
        reference=_bind(_defined),
        providers={
            OURS: Provider(_bind(_fused)),
            "decode product, sampler": Provider(_bind(_decode_and_sampler)),
            "cuBLAS, sampler": Provider(_bind(_vendor_and_sampler)),
        },
        check=close_to(0.0),
        axes={"rows": rows, "n": vocab, "k": k},
    )


def _inputs(
    vocab: int, k: int, dtype: torch.dtype, device: torch.device, rows: int, seed: int
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)

    def eighths(count: int) -> Tensor:
        numbers = torch.empty(count, k, dtype=torch.int8, device=device)
        return numbers.random_(-EIGHTHS, EIGHTHS + 1, generator=random).to(dtype).div_(EIGHTHS)

    params = SlotSampling.zeros(rows, vocab, device)
    for slot in range(rows):
        params.write(slot, SlotValues(temperature=1.0, seed=slot))
    head = eighths(vocab)
    slots = torch.arange(rows, device=device)
    return Inputs(eighths(rows), head, slots, params, Workspace.for_weights([head]))


def _bind(draw: Draw) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        def call() -> Outputs:
            sampled = draw(inputs)
            return sampled.token_ids, sampled.ok

        return call

    return prepare


def _defined(x: Inputs) -> SampledTokens:
    return draw_from_hidden_reference(x.x, x.head, x.slots, x.slots, x.params)


def _fused(x: Inputs) -> SampledTokens:
    return draw_from_hidden(x.x, x.head, x.slots, x.slots, x.params)


def _decode_and_sampler(x: Inputs) -> SampledTokens:
    logits = linear_decode(x.x, x.head, x.workspace).y
    return sample_triton(logits, x.slots, x.slots, x.params)


def _vendor_and_sampler(x: Inputs) -> SampledTokens:
    return sample_triton(F.linear(x.x, x.head), x.slots, x.slots, x.params)
