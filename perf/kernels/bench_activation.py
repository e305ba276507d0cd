"""silu(gate) * up and gelu_tanh(gate) * up, at 8k tokens of a prefill step.

Bytes of T tokens of F values of e bytes: 3 T F e, gate and up read, the product written.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from millrace.kernels.dispatch import Operations, operations
from millrace.perf.kernels.case import Call, Case, Prepare, close_in_bf16
from millrace.perf.kernels.providers import tables
from millrace.perf.kernels.session import Session

TOKENS, WIDTHS = 8192, (8192, 14336)  # Llama 1B, 8B
SMALL_TOKENS = 65
DRY_TOKENS, DRY_WIDTHS = 3, (80,)
DTYPE = torch.bfloat16
GOAL = 0.9
FLOPS_PER_VALUE = 6


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    tokens, small = (DRY_TOKENS, DRY_TOKENS) if dry_run else (TOKENS, SMALL_TOKENS)
    for width in DRY_WIDTHS if dry_run else WIDTHS:
        for kernel, bind in (("silu_mul", _silu), ("gelu_tanh_mul", _gelu)):
            yield Case(
                kernel=kernel,
                name=f"{tokens} x {width} bf16",
                bytes=3 * tokens * width * DTYPE.itemsize,
                flops=FLOPS_PER_VALUE * tokens * width,
                bound="memory",
                goal=GOAL,
                make=partial(_gate_up, tokens, width, device),
                make_small=partial(_gate_up, small, width, device),
                reference=bind(operations(device, "reference")),
                providers=tables(device, kernel, bind),
                check=close_in_bf16(device),
                axes={"tokens": tokens, "width": width},
            )


def _gate_up(tokens: int, width: int, device: torch.device, seed: int) -> Tensor:
    random = torch.Generator(device).manual_seed(seed)
    return torch.empty(tokens, 2 * width, dtype=DTYPE, device=device).normal_(generator=random)


def _silu(table: Operations) -> Prepare:
    def prepare(gate_up: Tensor) -> Call:
        return lambda: (table.silu_mul(gate_up),)

    return prepare


def _gelu(table: Operations) -> Prepare:
    def prepare(gate_up: Tensor) -> Call:
        return lambda: (table.gelu_tanh_mul(gate_up),)

    return prepare
