"""RMSNorm, alone and with the residual addition, at 8k tokens of a prefill step.

Bytes of T tokens of E values of e bytes:
    rms_norm       2 T E e + E e     x read, y written; the weight
    add_rms_norm   4 T E e + E e     x and residual read, y and the new residual written
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from millrace.kernels.dispatch import Operations, operations
from millrace.perf.kernels.case import Call, Case, Prepare, close_in_bf16
from millrace.perf.kernels.providers import tables
from millrace.perf.kernels.session import Session

TOKENS, HIDDEN = 8192, (2048, 4096, 8192)  # Llama 1B, 8B, 70B
SMALL_TOKENS = 65
DRY_TOKENS, DRY_HIDDEN = 3, (96,)
DTYPE = torch.bfloat16
EPS = 1e-5
GOAL = 0.9
FLOPS_PER_VALUE = 5


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    residual: Tensor
    weight: Tensor


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    tokens, small = (DRY_TOKENS, DRY_TOKENS) if dry_run else (TOKENS, SMALL_TOKENS)
    for hidden in DRY_HIDDEN if dry_run else HIDDEN:
        for kernel, bind, passes in (("rms_norm", _alone, 2), ("add_rms_norm", _with_add, 4)):
            yield Case(
                kernel=kernel,
                name=f"{tokens} x {hidden} bf16",
                bytes=(passes * tokens + 1) * hidden * DTYPE.itemsize,
                flops=FLOPS_PER_VALUE * tokens * hidden,
                bound="memory",
                goal=GOAL,
                make=partial(_inputs, tokens, hidden, device),
                make_small=partial(_inputs, small, hidden, device),
                reference=bind(operations(device, "reference")),
                providers=tables(device, kernel, bind),
                check=close_in_bf16(device),
                axes={"tokens": tokens, "hidden": hidden},
            )


def _inputs(tokens: int, hidden: int, device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    shapes = ((tokens, hidden), (tokens, hidden), (hidden,))
    empty = (torch.empty(shape, dtype=DTYPE, device=device) for shape in shapes)
    return Inputs(*(x.normal_(generator=random) for x in empty))


def _alone(table: Operations) -> Prepare:
    def prepare(x: Inputs) -> Call:
        return lambda: (table.rms_norm(x.x, x.weight, EPS),)

    return prepare


def _with_add(table: Operations) -> Prepare:
    def prepare(x: Inputs) -> Call:
        return lambda: table.add_rms_norm(x.x, x.residual, x.weight, EPS)

    return prepare
