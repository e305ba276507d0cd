"""Linear layers: 1 to 64 rows of a decode step at the speed of memory, and the prefill product.

y [M, N] = x [M, K] weight [N, K]^T in bf16. Bytes: (N K + M K + M N) e, the weight, x and y once.
Operations: 2 M N K. Below some 150 rows the weight's bytes take longer than the operations, so the
goal of decode is a share of the copy bandwidth; the goal of the deterministic prefill product is
0.9 times the speed of cuBLAS, which the summary sets beside it. Weights rotate as those of a
model's layers do. The check is against float32 at the very shape, which decides the splits.

Fused layers (`matmul_fused.py`) do the norm's division and silu * up, or the residual, in the same
kernel; their peer is cuBLAS with torch's operations after it. Their bytes count the residual read
and the scaled copy written, M N e each, and half of y where silu * up halves it. The cases of
bench_head.py, the last layer with the draw behind it, are part of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from millrace.kernels.gemv_triton import MAX_GEMV_ROWS, linear_gemv
from millrace.kernels.matmul_fused import (
    PLAIN,
    Fusion,
    InputNorm,
    LinearOutput,
    linear_fused_reference,
    linear_fused_vendor,
)
from millrace.kernels.matmul_persistent_triton import linear_persistent
from millrace.kernels.matmul_triton import Workspace, linear_decode
from millrace.perf.kernels import bench_head
from millrace.perf.kernels.case import OURS, Call, Case, Outputs, Prepare, Provider, close_in_bf16
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
FUSED_ROWS = (1, 16, 64)
PREFILL_LAYERS, PREFILL_ROWS = ("8B qkv", "8B gate_up", "8B down"), (512, 2048, 8192)
DRY_LAYERS, DRY_ROWS = {"qkv": (64, 128), "gate_up": (64, 128), "down": (64, 128)}, (3,)
DTYPE = torch.bfloat16
EPS = 1e-5
DECODE_GOAL = 0.93
GEMV = "millrace GEMV"
VENDOR = "cuBLAS"
PREFILL = "persistent matmul"  # the kernel of the prefill cases

Form = Callable[[Tensor, Tensor, Fusion], LinearOutput]


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    weight: Tensor
    fusion: Fusion


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    layers, rows_of_decode = (DRY_LAYERS, DRY_ROWS) if dry_run else (LAYERS, ROWS)
    for rows in rows_of_decode:
        for layer, shape in layers.items():
            yield _decode(layer, "", shape, rows, device)
    for rows in DRY_ROWS if dry_run else FUSED_ROWS:
        for layer, shape in layers.items():
            for kind in ("gate_up", "down"):
                if layer.endswith(kind):
                    yield _decode(layer, kind, shape, rows, device)
    yield from bench_head.cases(device, dry_run)
    for rows in DRY_ROWS if dry_run else PREFILL_ROWS:
        for layer in layers if dry_run else PREFILL_LAYERS:
            yield _prefill(layer, layers[layer], rows, device)


def _decode(
    layer: str, fused: str, shape: tuple[int, int], rows: int, device: torch.device
) -> Case:
    """`fused`: "gate_up" (norm in front, silu * up behind), "down" (residual), or ""."""
    n, k = shape
    written = {"": n, "gate_up": n // 2, "down": 3 * n}[fused]
    providers = {OURS: Provider(_decode_form), VENDOR: Provider(_form(linear_fused_vendor))}
    if rows <= MAX_GEMV_ROWS:
        providers[GEMV] = Provider(_form(linear_gemv))
    make = partial(_inputs, fused, rows, n, k, device)
    return Case(
        kernel="matmul",
        name=f"{layer} {n} x {k}, {rows} rows" + (", fused" if fused else ""),
        bytes=(n * k + rows * k + rows * written) * DTYPE.itemsize,
        flops=2 * rows * n * k,
        bound="memory",
        goal=DECODE_GOAL,
        make=make,
        make_small=make,
        reference=_form(linear_fused_reference),
        providers=providers,
        check=close_in_bf16(device),
        axes={"rows": rows, "n": n, "k": k},
    )


def _prefill(layer: str, shape: tuple[int, int], rows: int, device: torch.device) -> Case:
    n, k = shape
    make = partial(_inputs, "", rows, n, k, device)
    return Case(
        kernel=PREFILL,
        name=f"{layer} {n} x {k}, {rows} rows",
        bytes=(n * k + rows * k + rows * n) * DTYPE.itemsize,
        flops=2 * rows * n * k,
        bound="matmul",
        goal=None,
        make=make,
        make_small=make,
        reference=_form(linear_fused_reference),
        providers={
            OURS: Provider(_form(linear_persistent)),
            VENDOR: Provider(_form(linear_fused_vendor)),
        },
        check=close_in_bf16(device),
        axes={"rows": rows, "n": n, "k": k},
    )


def _inputs(fused: str, rows: int, n: int, k: int, device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=random)

    x, weight, fusion = normal(rows, k), normal(n, k), PLAIN
    if fused == "gate_up":
        squares = x.float().square().sum(dim=1, keepdim=True)
        fusion = Fusion(norm=InputNorm(squares, EPS), silu_mul=True)
    elif fused == "down":
        fusion = Fusion(residual=normal(rows, n), gamma=normal(n))
    return Inputs(x, weight, fusion)


def _form(form: Form) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        return lambda: _outputs(form(inputs.x, inputs.weight, inputs.fusion))

    return prepare


def _decode_form(inputs: Inputs) -> Call:
    workspace = Workspace.for_weights([inputs.weight])
    return lambda: _outputs(linear_decode(inputs.x, inputs.weight, workspace, inputs.fusion))


def _outputs(out: LinearOutput) -> Outputs:
    """Without the squares: each form has tiles of its own."""
    return (out.y,) if out.scaled is None else (out.y, out.scaled)
