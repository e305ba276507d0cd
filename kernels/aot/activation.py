"""The signatures with which the gated activations are launched."""

import torch

from millrace.kernels import activation_triton as activation
from millrace.kernels.aot.compiler import KernelSpec

TYPES = {"p_gate_up": "*bf16", "p_out": "*bf16", "stride_gate_up": "i32"}


def _spec(name: str, ffn: int, gelu: bool, interleaved: bool = False) -> KernelSpec:
    config = activation.gated_config(ffn, torch.device("cpu"))
    return KernelSpec(
        f"{name} F{ffn}",
        activation.gated_kernel,
        TYPES,
        {"FFN": ffn, "GELU": gelu, "INTERLEAVED": interleaved, **config.constants},
        config.options,
        aligned=("stride_gate_up",),
    )


SPECS = (
    _spec("silu_mul", 14336, gelu=False),
    _spec("silu_mul interleaved", 14336, gelu=False, interleaved=True),
    _spec("gelu_tanh_mul", 14336, gelu=True),
)
