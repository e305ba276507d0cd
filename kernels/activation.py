"""Gated activations of the feed-forward block (GLU variants, Shazeer 2020).

    silu_mul:       y = silu(gate) * up          silu(a) = a * sigmoid(a)
    gelu_tanh_mul:  y = gelu(gate) * up          the tanh approximation of GELU

gate_up [T, 2F] holds gate in its first half and up in its second, so that one matmul makes both;
the result is [T, F]. Interleaved, column 2j is gate j and column 2j + 1 is up j, as a weight makes
them whose rows `matmul_fused.interleave_gate_up` has put together. The activation is computed in
float32 and rounded to the dtype of gate_up before the product, as transformers' LlamaMLP does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import FLOATING_DTYPES


def silu_mul(gate_up: Tensor, interleaved: bool = False) -> Tensor:
    """silu(gate) * up; gate_up [T, 2F] -> [T, F]. ValueError where the width is odd."""
    expect_gate_up(gate_up)
    gate, up = _gate_and_up(gate_up, interleaved)
    return F.silu(gate).mul_(up)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up; gate_up [T, 2F] -> [T, F]. ValueError where the width is odd."""
    expect_gate_up(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def silu_mul_reference(gate_up: Tensor, interleaved: bool = False) -> Tensor:
    """The definition: `silu_mul`."""
    gate, up = _gate_and_up(gate_up, interleaved)
    gate32 = gate.float()
    return (gate32 * torch.sigmoid(gate32)).to(gate_up.dtype) * up


def gelu_tanh_mul_reference(gate_up: Tensor) -> Tensor:
    """The definition: `gelu_tanh_mul` (Hendrycks and Gimpel 2016, equation 2)."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate32 = gate.float()
    inner = math.sqrt(2.0 / math.pi) * (gate32 + 0.044715 * gate32.pow(3))
    return (0.5 * gate32 * (1.0 + torch.tanh(inner))).to(gate_up.dtype) * up


def expect_gate_up(gate_up: Tensor) -> None:
    """ValueError unless gate_up is [T, 2F] of a floating dtype."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in FLOATING_DTYPES:
        raise ValueError(
            "gate_up: expected [T, 2F] of a floating dtype, "
            f"got {list(gate_up.shape)} of {gate_up.dtype}"
        )


def _gate_and_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[:, 0::2], gate_up[:, 1::2]
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up
