"""The signatures with which append_attention is launched."""

import torch
import triton

from millrace.kernels import append_attention_triton, attention_triton
from millrace.kernels.aot import attention, kv_append
from millrace.kernels.aot.compiler import KernelSpec
from millrace.kernels.configs import UNFUSED


def _spec(name: str, targets: tuple[str, ...], group: int, norm: bool) -> KernelSpec:
    kernel, head_dim = append_attention_triton.append_attention_kernel, 128
    launch = attention_triton.default_config(
        torch.bfloat16, head_dim, hopper=targets == attention.HOPPER
    )
    types = attention.TYPES | kv_append.TYPES
    constants = {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_HALF": head_dim // 2,
        "Q_TILE": triton.next_power_of_2(group),
        "DECODE_M": attention_triton.MIN_BLOCK_M,
        "BLOCK_SIZE": 16,
        "SPLIT": attention_triton.SPLIT,
        "TILE": launch.constants["TILE"],
        "WINDOW": 0,
        "NORM": norm,
        "UPCAST": False,
        **({} if norm else {"p_q_norm": None, "p_k_norm": None}),
    }
    return KernelSpec(
        f"append and attention {name}",
        kernel,
        {argument: types.get(argument, "*fp32") for argument in kernel.arg_names},
        constants,
        {**launch.options, **UNFUSED},
        ("stride_qkv", "stride_cos_sin"),
        targets,
    )


SPECS = (
    _spec("D128", attention.HOPPER, 4, norm=False),
    _spec("D128 norm", attention.HOPPER, 5, norm=True),
    _spec("D128, small tiles", attention.OTHERS, 4, norm=False),
)
