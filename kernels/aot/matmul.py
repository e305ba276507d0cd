"""The signatures with which the matrix products are launched, on weights of Llama 8B.

Those with stages that AMD's shared memory does not hold come twice, as `default_stages` has it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from millrace.kernels import gemv_triton, lm_head_triton, matmul_persistent_triton, matmul_triton
from millrace.kernels.aot.compiler import KernelSpec
from millrace.kernels.configs import UNFUSED, LaunchConfig
from millrace.kernels.matmul_plan import BLOCK_K, BLOCK_N, plan, split_length
from millrace.kernels.matmul_tile_triton import Epilogue

TYPES = {
    "x": "*bf16",
    "weight": "*bf16",
    "p_x": "*bf16",
    "p_weight": "*bf16",
    "p_partial": "*fp32",
    "p_tickets": "*i32",
    "p_norm_squares": "*fp32",
    "p_head": "*bf16",
    "p_slots": "*i64",
    "p_positions": "*i64",
    "p_scalars": "*fp32",
    "p_seed": "*i64",
    "p_best": "*fp32",
    "p_best_id": "*i32",
    "p_token_ids": "*i64",
    "p_ok": "*u1",
    "num_rows": "i32",
    "blocks": "i32",
    "stride_x": "i32",
    "eps": "fp32",
}
QKV = Epilogue(
    eps="fp32",
    p_y="*bf16",
    p_bias=None,
    p_norm_squares="*fp32",
    p_residual=None,
    p_gamma=None,
    p_scaled=None,
    p_squares=None,
    NORM_TILES=tl.constexpr(64),
    SILU_MUL=tl.constexpr(False),
)
EPILOGUES = {
    "qkv": QKV,
    "gate_up": QKV._replace(SILU_MUL=tl.constexpr(True)),
    "down": QKV._replace(
        p_norm_squares=None,
        NORM_TILES=tl.constexpr(1),
        p_residual="*bf16",
        p_gamma="*bf16",
        p_scaled="*bf16",
        p_squares="*fp32",
    ),
}
SHAPES = {
    "qkv": (6144, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
HOPPER_ON, AMD = ("sm_90", "sm_100"), ("gfx942",)
STAGES, AMD_STAGES = 4, 2


def _types(layer: str) -> dict[str, Any]:
    return {**TYPES, "epilogue": EPILOGUES[layer]}


def _sizes(layer: str) -> dict[str, Any]:
    n, k = SHAPES[layer]
    return {"N": n, "K": k, "BLOCK_N": BLOCK_N, "UPCAST": False}


def _staged(
    name: str, kernel: Any, types: dict[str, Any], constants: dict[str, Any]
) -> tuple[KernelSpec, KernelSpec]:
    """With the stages of NVIDIA, and with AMD's."""
    aligned, cuda = ("stride_x",), ("sm_80", *HOPPER_ON)
    options, amd = (
        matmul_triton.decode_options(LaunchConfig(4, stages, {}), constants["BLOCK_T"])
        for stages in (STAGES, AMD_STAGES)
    )
    return (
        KernelSpec(name, kernel, types, constants, options, aligned, cuda),
        KernelSpec(f"{name} AMD", kernel, types, constants, amd, aligned, AMD),
    )


def _decode(layer: str, block_t: int) -> tuple[KernelSpec, KernelSpec]:
    constants = {**_sizes(layer), **_splits(*SHAPES[layer]), "BLOCK_K": BLOCK_K}
    constants |= {"BLOCK_T": block_t, "PDL": False, "TMA": False}
    name = f"matmul decode {layer} T{block_t}"
    return _staged(name, matmul_triton.decode_kernel, _types(layer), constants)


def _variant(spec: KernelSpec, variant: str) -> KernelSpec:
    """PDL or TMA on, where there is such a thing."""
    constants = {**spec.constants, variant: True}
    types = _described(spec.types, constants) if variant == "TMA" else spec.types
    options = {**spec.options, "launch_pdl": True} if variant == "PDL" else spec.options
    name = f"{spec.name} {variant}"
    return replace(
        spec, name=name, types=types, constants=constants, options=options, targets=HOPPER_ON
    )


def _described(types: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    n, t, k = (constants[f"BLOCK_{letter}"] for letter in "NTK")
    return {**types, "x": f"tensordesc<bf16[{t},{k}]>", "weight": f"tensordesc<bf16[{n},{k}]>"}


def _persistent(layer: str) -> tuple[KernelSpec, ...]:
    """Through descriptors where there is TMA, through pointers elsewhere."""
    persistent, name = matmul_persistent_triton, f"matmul persistent {layer}"
    constants = {**_sizes(layer), **_splits(*SHAPES[layer]), **persistent.CONSTANTS, "TMA": True}
    kernel, aligned = persistent.persistent_kernel, ("stride_x",)
    options, amd = (
        {**LaunchConfig(persistent.NUM_WARPS, stages, {}).options, **UNFUSED}
        for stages in (STAGES, AMD_STAGES)
    )
    types, without = _types(layer), {**constants, "TMA": False}
    described = _described(types, constants)
    return (
        KernelSpec(f"{name} TMA", kernel, described, constants, options, aligned, HOPPER_ON),
        KernelSpec(name, kernel, types, without, options, aligned, ("sm_80",)),
        KernelSpec(f"{name} AMD", kernel, types, without, amd, aligned, AMD),
    )


def _head(block_t: int) -> tuple[KernelSpec, KernelSpec]:
    vocab, k = SHAPES["head"]
    constants = {"V": vocab, "K": k, **_splits(vocab, k), "BLOCK_K": BLOCK_K, "UPCAST": False}
    constants |= {"NORM_TILES": 64, "BLOCK_T": block_t}
    return _staged(f"lm head draw T{block_t}", lm_head_triton.head_kernel, TYPES, constants)


def _splits(n: int, k: int) -> dict[str, Any]:
    splits = plan(n, k).splits
    return {"SPLITS": splits, "SPLIT_LENGTH": split_length(k, splits, BLOCK_K)}


def _gemv(layer: str, block_t: int) -> KernelSpec:
    config = gemv_triton.default_gemv_config(element_size=2)
    return KernelSpec(
        f"matmul gemv {layer} T{block_t}",
        gemv_triton.gemv_kernel,
        _types(layer),
        {**_sizes(layer), **config.constants, "BLOCK_T": block_t, "PDL": False},
        config.options,
        aligned=("stride_x",),
    )


DECODE = (*_decode("gate_up", 16), *_decode("qkv", 32), *_decode("down", 64))
HEAD_BLOCKS = lm_head_triton.num_blocks(SHAPES["head"][0])
SPECS = (
    *DECODE,
    _variant(DECODE[0], "PDL"),
    _variant(DECODE[0], "TMA"),
    _gemv("gate_up", 1),
    _variant(_gemv("gate_up", 1), "PDL"),
    _gemv("down", 4),
    *_persistent("gate_up"),
    *_head(16),
    KernelSpec(
        "lm head best",
        lm_head_triton.best_kernel,
        TYPES,
        {"BLOCKS": HEAD_BLOCKS, "PADDED": triton.next_power_of_2(HEAD_BLOCKS)},
        lm_head_triton.BEST_OPTIONS,
    ),
)
