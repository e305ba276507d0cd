"""GPUs by name, as their makers' data sheets have them. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.engine.errors import InvalidRequest

GB, TB_PER_S, TFLOP_PER_S = 1e9, 1e12, 1e12


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; matrix rates are dense, without sparsity, of 16-bit operands."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * GB, 2.039 * TB_PER_S, 312 * TFLOP_PER_S),  # SXM, 80 GB
        Gpu("l40s", 48 * GB, 0.864 * TB_PER_S, 362 * TFLOP_PER_S),
        Gpu("h100", 80 * GB, 3.35 * TB_PER_S, 989 * TFLOP_PER_S),  # SXM
        Gpu("h200", 141 * GB, 4.8 * TB_PER_S, 989 * TFLOP_PER_S),  # SXM
        Gpu("b200", 180 * GB, 7.7 * TB_PER_S, 2250 * TFLOP_PER_S),
        Gpu("mi300x", 192 * GB, 5.3 * TB_PER_S, 1307 * TFLOP_PER_S),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises InvalidRequest naming those that are known."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        known = ", ".join(GPUS)
        raise InvalidRequest(f"no GPU {name!r}; known are {known}", "gpu", known) from None
