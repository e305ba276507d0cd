"""The signatures with which RMSNorm is launched."""

import torch
import triton

from millrace.kernels import norm_triton as norm
from millrace.kernels.aot.compiler import KernelSpec

TYPES = {
    "p_x": "*bf16",
    "p_residual": "*bf16",
    "p_weight": "*bf16",
    "p_y": "*bf16",
    "p_sum": "*bf16",
    "num_rows": "i32",
    "stride_x": "i32",
    "stride_residual": "i32",
    "eps": "fp32",
}
ALONE = {"p_residual": None, "p_sum": None}


def _spec(hidden: int, add: bool) -> KernelSpec:
    config = norm.norm_config(hidden, torch.device("cpu"))
    constants = {
        "HIDDEN": hidden,
        "BLOCK_E": triton.next_power_of_2(hidden),
        "ADD": add,
        **config.constants,
        **({} if add else ALONE),
    }
    return KernelSpec(
        f"{'add and ' if add else ''}norm E{hidden}",
        norm.rms_norm_kernel,
        TYPES,
        constants,
        config.options,
        aligned=("stride_x", "stride_residual"),
    )


SPECS = (_spec(576, True), _spec(4096, True), _spec(16384, True), _spec(128, False))
