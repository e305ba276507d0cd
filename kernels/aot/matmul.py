"""The signatures with which the matrix products are launched, on weights of Llama 8B."""

from typing import Any

from millrace.kernels import gemv_triton, matmul_persistent_triton, matmul_triton
from millrace.kernels.aot.compiler import KernelSpec
from millrace.kernels.matmul_plan import BLOCK_K, BLOCK_N, plan, split_length

TYPES = {
    "p_x": "*bf16",
    "p_weight": "*bf16",
    "p_partial": "*fp32",
    "p_tickets": "*i32",
    "p_y": "*bf16",
    "p_bias": "*bf16",
    "p_norm_squares": "*fp32",
    "p_residual": "*bf16",
    "p_gamma": "*bf16",
    "p_scaled": "*bf16",
    "p_squares": "*fp32",
    "num_rows": "i32",
    "stride_x": "i32",
    "eps": "fp32",
}
FUSIONS: dict[str, dict[str, Any]] = {  # what is absent in each, as finish_arguments says it
    "qkv": {"p_bias": None, "p_residual": None, "NORM_TILES": 64, "SILU_MUL": False},
    "gate_up": {"p_bias": None, "p_residual": None, "NORM_TILES": 64, "SILU_MUL": True},
    "down": {"p_bias": None, "p_norm_squares": None, "NORM_TILES": 1, "SILU_MUL": False},
}
WITHOUT_RESIDUAL = {"p_gamma": None, "p_scaled": None, "p_squares": None}
SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
NVIDIA_PDL = ("sm_90", "sm_100")


def _fusion(layer: str) -> dict[str, Any]:
    n, k = SHAPES[layer]
    absent = WITHOUT_RESIDUAL if "p_residual" in FUSIONS[layer] else {}
    return {"N": n, "K": k, "BLOCK_N": BLOCK_N, "UPCAST": False, **FUSIONS[layer], **absent}


def _decode(layer: str, block_t: int, pdl: bool = False) -> tuple[KernelSpec, ...]:
    """Fewer stages where AMD's shared memory is small, as `default_stages` has it."""
    n, k = SHAPES[layer]
    splits = plan(n, k).splits
    constants = {
        **_fusion(layer),
        "SPLITS": splits,
        "SPLIT_LENGTH": split_length(k, splits, BLOCK_K),
        "BLOCK_T": block_t,
        "BLOCK_K": BLOCK_K,
        "PDL": pdl,
    }
    name = f"matmul decode {layer} T{block_t}{' PDL' if pdl else ''}"
    stages = matmul_triton.WIDE_STAGES if block_t > 32 else 4
    kernel, aligned = matmul_triton.decode_kernel, ("stride_x",)
    cuda = NVIDIA_PDL if pdl else ("sm_80", *NVIDIA_PDL)
    nvidia = KernelSpec(name, kernel, TYPES, constants, 4, stages, aligned, cuda)
    amd = KernelSpec(f"{name}, 2 stages", kernel, TYPES, constants, 4, 2, aligned, ("gfx942",))
    return (nvidia,) if pdl else (nvidia, amd)


def _gemv(layer: str, block_t: int) -> KernelSpec:
    config = gemv_triton.DEFAULT
    return KernelSpec(
        f"matmul gemv {layer} T{block_t}",
        gemv_triton.gemv_kernel,
        TYPES,
        {**_fusion(layer), **config.constants, "BLOCK_T": block_t},
        config.num_warps,
        config.num_stages,
        aligned=("stride_x",),
    )


def _persistent(layer: str) -> tuple[KernelSpec, ...]:
    n, k = SHAPES[layer]
    splits = plan(n, k).splits
    constants = {
        **_fusion(layer),
        **matmul_persistent_triton.CONSTANTS,
        "SPLITS": splits,
        "SPLIT_LENGTH": split_length(k, splits, BLOCK_K),
    }
    name, kernel = f"matmul persistent {layer}", matmul_persistent_triton.persistent_kernel
    warps, aligned = matmul_persistent_triton.NUM_WARPS, ("stride_x",)
    cuda = ("sm_80", *NVIDIA_PDL)
    return (
        KernelSpec(name, kernel, TYPES, constants, warps, 4, aligned, cuda),
        KernelSpec(f"{name}, 2 stages", kernel, TYPES, constants, warps, 2, aligned, ("gfx942",)),
    )


SPECS = (
    *_decode("qkv", 16),
    *_decode("gate_up", 32),
    *_decode("down", 64),
    *_decode("gate_up", 16, pdl=True),
    _gemv("gate_up", 1),
    _gemv("down", 4),
    *_persistent("gate_up"),
    *_persistent("down"),
)
