"""The signatures with which the matrix products are launched, on weights of Llama 8B.

Those with stages that AMD's shared memory does not hold come twice, as `default_stages` has it.
"""

from dataclasses import replace
from typing import Any

import triton

from millrace.kernels import gemv_triton, lm_head_triton, matmul_persistent_triton, matmul_triton
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
    "p_head": "*bf16",
    "p_slots": "*i64",
    "p_positions": "*i64",
    "p_temperature": "*fp32",
    "p_seed": "*i64",
    "p_best": "*fp32",
    "p_best_id": "*i32",
    "p_token_ids": "*i64",
    "p_ok": "*i1",
    "num_rows": "i32",
    "blocks": "i32",
    "stride_x": "i32",
    "eps": "fp32",
}
FUSIONS: dict[str, dict[str, Any]] = {  # what is absent in each, as finish_arguments says it
    "qkv": {"p_bias": None, "p_residual": None, "NORM_TILES": 64, "SILU_MUL": False},
    "gate_up": {"p_bias": None, "p_residual": None, "NORM_TILES": 64, "SILU_MUL": True},
    "down": {"p_bias": None, "p_norm_squares": None, "NORM_TILES": 1, "SILU_MUL": False},
}
WITHOUT_RESIDUAL = {"p_gamma": None, "p_scaled": None, "p_squares": None}
SHAPES = {
    "qkv": (6144, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
HOPPER_ON = ("sm_90", "sm_100")


def _fusion(layer: str) -> dict[str, Any]:
    n, k = SHAPES[layer]
    absent = WITHOUT_RESIDUAL if "p_residual" in FUSIONS[layer] else {}
    return {"N": n, "K": k, "BLOCK_N": BLOCK_N, "UPCAST": False, **FUSIONS[layer], **absent}


def _staged(
    name: str, kernel: Any, constants: dict[str, Any], num_warps: int, stages: int
) -> tuple[KernelSpec, KernelSpec]:
    """For NVIDIA with `stages`, and for AMD with two."""
    aligned, cuda = ("stride_x",), ("sm_80", *HOPPER_ON)
    return (
        KernelSpec(name, kernel, TYPES, constants, num_warps, stages, aligned, cuda),
        KernelSpec(f"{name} AMD", kernel, TYPES, constants, num_warps, 2, aligned, ("gfx942",)),
    )


def _decode(layer: str, block_t: int) -> tuple[KernelSpec, KernelSpec]:
    constants = {**_fusion(layer), **_splits(*SHAPES[layer]), "BLOCK_K": BLOCK_K}
    constants |= {"BLOCK_T": block_t, "PDL": False}
    stages = matmul_triton.WIDE_STAGES if block_t > 32 else 4
    name = f"matmul decode {layer} T{block_t}"
    return _staged(name, matmul_triton.decode_kernel, constants, 4, stages)


def _pdl(decode: KernelSpec) -> KernelSpec:
    constants = {**decode.constants, "PDL": True}
    return replace(decode, name=f"{decode.name} PDL", constants=constants, targets=HOPPER_ON)


def _persistent(layer: str) -> tuple[KernelSpec, KernelSpec]:
    persistent = matmul_persistent_triton
    constants = {**_fusion(layer), **_splits(*SHAPES[layer]), **persistent.CONSTANTS}
    kernel = persistent.persistent_kernel
    return _staged(f"matmul persistent {layer}", kernel, constants, persistent.NUM_WARPS, 4)


def _head(block_t: int) -> tuple[KernelSpec, KernelSpec]:
    vocab, k = SHAPES["head"]
    constants = {"V": vocab, "K": k, **_splits(vocab, k), "BLOCK_K": BLOCK_K, "UPCAST": False}
    constants |= {"NORM_TILES": 64, "BLOCK_T": block_t}
    stages = matmul_triton.WIDE_STAGES if block_t > 32 else 4
    return _staged(f"lm head draw T{block_t}", lm_head_triton.head_kernel, constants, 4, stages)


def _splits(n: int, k: int) -> dict[str, Any]:
    splits = plan(n, k).splits
    return {"SPLITS": splits, "SPLIT_LENGTH": split_length(k, splits, BLOCK_K)}


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


DECODE = (*_decode("gate_up", 16), *_decode("qkv", 32), *_decode("down", 64))
HEAD_BLOCKS = lm_head_triton.num_blocks(SHAPES["head"][0])
SPECS = (
    *DECODE,
    _pdl(DECODE[0]),
    _gemv("gate_up", 1),
    _gemv("down", 4),
    *_persistent("gate_up"),
    *_head(16),
    KernelSpec(
        "lm head best",
        lm_head_triton.best_kernel,
        TYPES,
        {"BLOCKS": HEAD_BLOCKS, "PADDED": triton.next_power_of_2(HEAD_BLOCKS)},
        lm_head_triton.BEST_WARPS,
    ),
)
