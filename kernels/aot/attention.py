"""The signatures with which paged attention is launched."""

import torch
import triton

from millrace.kernels import attention_decode_triton, attention_triton
from millrace.kernels.aot.compiler import KernelSpec
from millrace.kernels.configs import UNFUSED

TYPES = {  # of the arguments that are not *fp32
    "p_q": "*bf16",
    "p_k": "*bf16",
    "p_v": "*bf16",
    "p_block_table": "*i32",
    "p_slots": "*i64",
    "p_query_start": "*i32",
    "p_context_lens": "*i32",
    "p_out": "*bf16",
    "scale": "fp32",
    "softcap_log2": "fp32",
    "num_decodes": "i32",
    "num_rows": "i32",
    "capacity": "i32",
    "stride_q_token": "i32",
    "stride_q_head": "i32",
    "stride_table": "i32",
}
HOPPER = ("sm_90",)
OTHERS = ("sm_80", "sm_100", "gfx942")
WITH_FP8 = ("sm_100", "gfx942")


def _attention(
    name: str,
    targets: tuple[str, ...],
    head_dim: int,
    group: int,
    *,
    prefills: bool = True,
    block_size: int = 16,
    window: int = 0,
    softcap: bool = False,
    fp8: bool = False,
    fp32: bool = False,
) -> KernelSpec:
    dtype = torch.float32 if fp32 else torch.bfloat16
    launch = attention_triton.default_config(dtype, head_dim, targets == HOPPER)
    types = {n: TYPES.get(n, "*fp32") for n in attention_triton.attention_kernel.arg_names}
    if fp32:
        types |= {"p_q": "*fp32", "p_k": "*fp32", "p_v": "*fp32", "p_out": "*fp32"}
    scales = {"p_k_scale": None, "p_v_scale": None}
    if fp8:
        types |= {"p_k": "*fp8e4nv", "p_v": "*fp8e4nv"}
        scales = {}
    constants = scales | {
        "HAS_DECODES": True,
        "HAS_PREFILLS": prefills,
        "SCALED": fp8,
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "DECODE_M": attention_triton.MIN_BLOCK_M,
        "BLOCK_SIZE": block_size,
        "SPLIT": attention_triton.SPLIT,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "UPCAST": False,
        **launch.constants,
    }
    return KernelSpec(
        f"attention {name}",
        attention_triton.attention_kernel,
        types,
        constants,
        {**launch.options, **UNFUSED},
        ("stride_q_token", "stride_q_head"),
        targets,
    )


def _merge(head_dim: int) -> KernelSpec:
    return KernelSpec(
        f"attention merge D{head_dim}",
        attention_decode_triton.merge_kernel,
        {n: TYPES.get(n, "*fp32") for n in attention_decode_triton.merge_kernel.arg_names},
        {
            "p_v_scale": None,
            "SCALED": False,
            "GROUP": 4,
            "HEAD_DIM": head_dim,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "SPLIT": attention_triton.SPLIT,
            "WINDOW": 0,
            "UNROLL": attention_triton.MERGE_UNROLL,
        },
        attention_triton.MERGE_OPTIONS,
    )


SPECS = (
    _attention("decode D128", HOPPER, 128, 4, prefills=False),
    _attention("mixed D64 P64", HOPPER, 64, 3, block_size=64),
    _attention("mixed D80", HOPPER, 80, 1),
    _attention("mixed D128", HOPPER, 128, 4),
    _attention("mixed D128 fp8", HOPPER, 128, 4, fp8=True),
    _attention("mixed D256 window softcap", HOPPER, 256, 2, window=4096, softcap=True),
    _attention("decode D128, small tiles", OTHERS, 128, 4, prefills=False),
    _attention("mixed D96, small tiles", OTHERS, 96, 1),
    _attention("mixed D128 fp8, small tiles", WITH_FP8, 128, 4, fp8=True),
    _attention("mixed D256 window softcap, small tiles", OTHERS, 256, 2, window=4096, softcap=True),
    _attention("mixed D128 fp32", (*HOPPER, *OTHERS), 128, 4, fp32=True),
    _merge(128),
)
