"""The signatures with which kv_append is launched."""

from typing import Any

import torch
import triton

from millrace.kernels import kv_append_triton as kv_append
from millrace.kernels.aot.compiler import KernelSpec

TYPES = {
    "p_qkv": "*bf16",
    "p_positions": "*i64",
    "p_write_index": "*i64",
    "p_cos_sin": "*fp32",
    "p_q": "*bf16",
    "p_k_cache": "*bf16",
    "p_v_cache": "*bf16",
    "p_q_norm": "*bf16",
    "p_k_norm": "*bf16",
    "p_k_scale": "*fp32",
    "p_v_scale": "*fp32",
    "stride_qkv": "i32",
    "stride_cos_sin": "i32",
    "eps": "fp32",
}


def _spec(
    heads: int, kv_heads: int, head_dim: int, norm: bool = False, fp8: bool = False
) -> KernelSpec:
    config = kv_append.append_config(head_dim, torch.device("cpu"))
    constants: dict[str, Any] = {
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": kv_heads,
        "HALF": head_dim // 2,
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
        **config.constants,
        "NORM": norm,
        "FP8": fp8,
    }
    if not norm:
        constants |= {"p_q_norm": None, "p_k_norm": None}
    if not fp8:
        constants |= {"p_k_scale": None, "p_v_scale": None}
    cache = {"p_k_cache": "*u8", "p_v_cache": "*u8"} if fp8 else {}
    return KernelSpec(
        f"kv_append D{head_dim}{' norm' if norm else ''}{' fp8' if fp8 else ''}",
        kv_append.kv_append_kernel,
        TYPES | cache,
        constants,
        config.options,
        aligned=("stride_qkv", "stride_cos_sin"),
    )


SPECS = (
    _spec(32, 8, 128),
    _spec(32, 8, 128, norm=True, fp8=True),
    _spec(9, 3, 64),
    _spec(32, 32, 80),
    _spec(16, 8, 256, norm=True),
)
