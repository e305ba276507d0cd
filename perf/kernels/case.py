"""What a benchmark is made of: cases, what can run them, and the row that comes out.

A case is one shape of one kernel. It says how many bytes the shape must move and how many floating
point operations it must do (counted from the data, each input read once and each output written
once), makes its inputs from a seed, and lists its providers: ours, torch, and other people's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "millrace"
"""The provider whose rows have goals; names of our other forms begin with it."""

BF16_TOLERANCE, BF16_TRUNCATED = 5e-3, 2e-2

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Prepare = Callable[[Any], Call]
"""Inputs -> a call that can be timed: what a step does once (plans, tables) is done before."""
Check = Callable[[Any, Outputs, Outputs], str]
"""(inputs, got, wanted) -> what is wrong, "" where nothing is."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Somebody who can run a case."""

    prepare: Prepare
    capturable: bool = True  # whether its call never waits for the device
    check: Check | None = None  # in place of the case's: for a peer that may answer differently
    extra_bytes: int = 0  # of memory that it needs beside the inputs


@dataclass(frozen=True, slots=True)
class Absent:
    """A provider that cannot run here, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of one kernel. `make` and `make_small` give equal inputs for equal seeds."""

    kernel: str
    name: str
    bytes: int
    flops: int
    bound: Literal["memory", "matmul"]  # the ceiling that the goal is a share of
    goal: float | None  # ours at least
    make: Callable[[int], Any]
    make_small: Callable[[int], Any]  # the same kernel on few rows, for the check
    reference: Prepare
    providers: Mapping[str, Provider | Absent]
    check: Check
    axes: Mapping[str, int]  # the numbers that the plots put on their axes


@dataclass(frozen=True, slots=True)
class Row:
    """One provider on one case. Without a time, `note` says why."""

    kernel: str
    case: str
    provider: str
    bytes: int
    flops: int
    goal: float | None
    axes: Mapping[str, int]
    status: Literal["measured", "FAILED", "unusable", "skipped"]  # a peer that fails is unusable
    note: str = ""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    mode: str | None = None  # of Timing
    share: float | None = None  # of the ceiling, measured in the same run
    share_at_size: float | None = None  # of a copy of as many bytes, launch and all
    ok: bool | None = None  # whether the goal was reached; None where there is none


def close_to(tolerance: float) -> Check:
    """Every float output within `tolerance` of the reference, |got - want| / |want|; ids equal."""

    def check(inputs: Any, got: Outputs, wanted: Outputs) -> str:
        if len(got) != len(wanted):
            return f"{len(got)} outputs in place of {len(wanted)}"
        for i_output, (x, want) in enumerate(zip(got, wanted, strict=True)):
            if x.shape != want.shape:
                return f"output {i_output}: shape {list(x.shape)}, not {list(want.shape)}"
            if not x.is_floating_point():
                if not torch.equal(x, want):
                    return f"output {i_output}: {int((x != want).sum())} elements differ"
                continue
            error = relative_error(x, want)
            if not error <= tolerance:  # NaN never passes
                return f"output {i_output}: relative error {error:.3g}, more than {tolerance:g}"
        return ""

    return check


def close_in_bf16(device: torch.device) -> Check:
    """For results of a few roundings to bf16. Triton's interpreter truncates where a GPU rounds."""
    return close_to(BF16_TOLERANCE if device.type == "cuda" else BF16_TRUNCATED)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, in float64 where NaN stands in the same places (unused memory)."""
    x, want = got.double(), wanted.double()
    unused = x.isnan() & want.isnan()
    x, want = x.masked_fill(unused, 0.0), want.masked_fill(unused, 0.0)
    return float((x - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))
