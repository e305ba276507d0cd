"""Our own tables as providers: the Triton kernels, torch's operations, the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millrace.kernels.dispatch import Operations, operations
from millrace.perf.kernels.case import OURS, Absent, Prepare, Provider

Bind = Callable[[Operations], Prepare]

TORCH, NAIVE = "torch", "reference"
NOT_FUSED = Absent("no Triton kernel for it yet: the triton backend runs torch's form")
ON_CPU = Absent("needs a GPU")


def ours(device: torch.device, operation: str, bind: Bind) -> Provider | Absent:
    """The Triton form of one operation."""
    table = operations(device, "triton")
    same: Any = getattr(operations(torch.device("cuda"), "torch"), operation)
    return NOT_FUSED if getattr(table, operation) is same else Provider(bind(table))


def tables(device: torch.device, operation: str, bind: Bind) -> dict[str, Provider | Absent]:
    """One operation of each backend. `bind` makes a Prepare that calls it through a table."""
    return {
        OURS: ours(device, operation, bind),
        TORCH: Provider(bind(operations(device, "torch"))),
        NAIVE: Provider(bind(operations(device, "reference"))),
    }
