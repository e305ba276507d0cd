"""Decode GEMMs: 1 to 64 rows through the linear layers of Llama, against cuBLAS.

y [M, N] = x [M, K] weight [N, K]^T in bf16. Bytes: (N K + M K + M N) e, the weight, x and y once.
Operations: 2 M N K. Below some 150 rows the weight's bytes take longer than the operations, so the
goal is a share of the copy bandwidth. Weights rotate as those of a model's layers do. The check is
against float32 at the very shape: how a product is split depends on the weight's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from millrace.kernels.dispatch import Operations
from millrace.kernels.matmul import pack_linear_reference
from millrace.perf.kernels.case import OURS, Call, Case, Prepare, Provider, close_in_bf16
from millrace.perf.kernels.providers import ours
from millrace.perf.kernels.session import Session

LAYERS = {  # name: (N, K)
    "1B qkv": (3072, 2048),
    "1B o": (2048, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "1B head": (128256, 2048),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "70B/8 qkv": (1280, 8192),
    "70B/8 o": (8192, 1024),
    "70B/8 gate_up": (7168, 8192),
    "70B/8 down": (8192, 3584),
    "70B/8 head": (16032, 8192),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
DRY_LAYERS, DRY_ROWS = {"tiny": (64, 128)}, (1, 3)
DTYPE = torch.bfloat16
GOAL = 0.93


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    weight: Tensor


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    layers = DRY_LAYERS if dry_run else LAYERS
    for rows in DRY_ROWS if dry_run else ROWS:
        for layer, (n, k) in layers.items():
            make = partial(_inputs, rows, n, k, device)
            yield Case(
                kernel="matmul",
                name=f"{layer} {n} x {k}, {rows} rows",
                bytes=(n * k + rows * k + rows * n) * DTYPE.itemsize,
                flops=2 * rows * n * k,
                bound="memory",
                goal=GOAL,
                make=make,
                make_small=make,
                reference=_in_float32,
                providers={
                    OURS: ours(device, "pack_linear", _packed),
                    "cuBLAS": Provider(_library),
                },
                check=close_in_bf16(device),
                axes={"rows": rows, "n": n, "k": k},
            )


def _inputs(rows: int, n: int, k: int, device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    shapes = ((rows, k), (n, k))
    empty = (torch.empty(shape, dtype=DTYPE, device=device) for shape in shapes)
    return Inputs(*(x.normal_(generator=random) for x in empty))


def _packed(table: Operations) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        layer = table.pack_linear(inputs.weight)
        return lambda: (layer(inputs.x),)

    return prepare


def _library(inputs: Inputs) -> Call:
    layer = pack_linear_reference(inputs.weight)
    return lambda: (layer(inputs.x),)


def _in_float32(inputs: Inputs) -> Call:
    return lambda: (inputs.x.float() @ inputs.weight.float().T,)
