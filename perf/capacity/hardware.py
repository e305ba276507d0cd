"""GPUs by name, as their makers' data sheets have them. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.engine.errors import InvalidRequest

GB, TB_PER_S, TFLOP_PER_S = 1e9, 1e12, 1e12


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; matrix rates are dense, without sparsity, of 16-bit operands.

    Data sheets give a link's rate of both directions together: `link_bytes_per_s` is half of it.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float  # to the host or back


PCIE_4, PCIE_5 = 32 * GB, 64 * GB  # of 16 lanes, one direction
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * GB, 2.039 * TB_PER_S, 312 * TFLOP_PER_S, PCIE_4),  # SXM, 80 GB
        Gpu("l40s", 48 * GB, 0.864 * TB_PER_S, 362 * TFLOP_PER_S, PCIE_4),
        Gpu("h100", 80 * GB, 3.35 * TB_PER_S, 989 * TFLOP_PER_S, PCIE_5),  # SXM
        Gpu("h200", 141 * GB, 4.8 * TB_PER_S, 989 * TFLOP_PER_S, PCIE_5),  # SXM
        Gpu("b200", 180 * GB, 7.7 * TB_PER_S, 2250 * TFLOP_PER_S, PCIE_5),
        Gpu("mi300x", 192 * GB, 5.3 * TB_PER_S, 1307 * TFLOP_PER_S, PCIE_5),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises InvalidRequest naming those that are known."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        known = ", ".join(GPUS)
        raise InvalidRequest(f"no GPU {name!r}; known are {known}", "gpu", known) from None
