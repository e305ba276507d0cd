"""The signatures with which paged attention is launched."""

from typing import Any

import triton

from millrace.kernels import attention_triton as attention
from millrace.kernels.aot.compiler import KernelSpec

TYPES = {
    "p_q": "*bf16",
    "p_k": "*bf16",
    "p_v": "*bf16",
    "p_block_table": "*i32",
    "p_slots": "*i64",
    "p_context_lens": "*i32",
    "p_out": "*bf16",
    "p_partial": "*fp32",
    "p_max": "*fp32",
    "p_sum": "*fp32",
    "scale_log2": "fp32",
    "softcap_log2": "fp32",
    "stride_q_token": "i32",
    "stride_q_head": "i32",
    "stride_table": "i32",
    "num_splits": "i32",
}


def _decode(
    name: str, head_dim: int, group: int, window: int = 0, softcap: bool = False
) -> KernelSpec:
    constants: dict[str, Any] = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": attention.MIN_BLOCK_M,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": 16,
        "SPLIT": attention.SPLIT,
        "TILE": attention.TILE,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "UPCAST": False,
    }
    return KernelSpec(
        f"attention decode {name}",
        attention._decode_kernel,
        TYPES,
        constants,
        attention.NUM_WARPS,
        attention.NUM_STAGES,
    )


SPECS = (
    _decode("D64", 64, 3),
    _decode("D128", 128, 4),
    _decode("D80", 80, 1),
    _decode("D256 window softcap", 256, 2, window=4096, softcap=True),
    KernelSpec(
        "attention merge D128",
        attention._merge_kernel,
        TYPES,
        {"HEAD_DIM": 128, "BLOCK_D": 128, "SPLIT": attention.SPLIT, "WINDOW": 0},
    ),
)
