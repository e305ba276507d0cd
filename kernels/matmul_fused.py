"""Linear layers with what stands before and after them in a decoder folded in, and their reference.

    acc      = x @ weight^T                                     float32
    acc      = acc * 1 / sqrt(sum(norm.squares) / K + eps)      with a norm before the layer
    acc      = acc + bias                                       with a bias
    y        = round(acc)                                       plain
    y        = round(silu(gate) * up)                           silu_mul
    y        = round(acc + residual)                            residual: the new residual, then
    scaled   = round(y * gamma)                                 what the next layer multiplies
    squares  = sum of y^2 over tiles of y's columns             float32, what its norm needs

RMSNorm (`norm.py`) is gamma * (r / rms(r)). Its division is by one number a row, so it may follow
the product with the weight instead of going before it: the layer that writes the residual r writes
r * gamma and the squares as well, the layer that reads it multiplies by r * gamma and divides its
sums by the rms. No kernel for the norm is left, and there is one rounding less than transformers
has, so results are not bit-equal to the unfused chain.

gate and up of a gated feed-forward are interleaved at load (`interleave_gate_up`): row 2j of the
weight is gate j and row 2j + 1 is up j, so that a tile of rows holds both. silu(a) = a sigmoid(a).

x [T, K], weight [N, K], bias [N], residual [T, N], gamma [N]; y [T, N], or [T, N / 2] of silu_mul.
Every form (`gemv_triton.py`, `matmul_triton.py`, `matmul_persistent_triton.py`, the vendor's below)
takes a `Fusion` and gives a `LinearOutput`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import FLOATING_DTYPES, expect, expect_contiguous


@dataclass(frozen=True, slots=True)
class InputNorm:
    """The RMSNorm in front of a layer; x is r * gamma, r the residual."""

    squares: Tensor  # f32 [T, tiles], partial sums of r^2
    eps: float


@dataclass(frozen=True, slots=True)
class Fusion:
    """What is folded into a linear layer; nothing by default. residual and gamma go together."""

    bias: Tensor | None = None
    norm: InputNorm | None = None
    silu_mul: bool = False
    residual: Tensor | None = None
    gamma: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LinearOutput:
    """y, and with a residual what the next layer needs."""

    y: Tensor
    scaled: Tensor | None = None  # [T, N]
    squares: Tensor | None = None  # f32 [T, tiles]; how many tiles is up to the form


PLAIN = Fusion()


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """gate [F, ...] and up [F, ...] -> [2F, ...], row by row: weights, or biases."""
    expect("up", up, tuple(gate.shape), gate.dtype)
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def linear_fused_reference(x: Tensor, weight: Tensor, fusion: Fusion = PLAIN) -> LinearOutput:
    """The definition: every sum in float32, one rounding for each tensor that is written."""
    check_linear(x, weight, fusion)
    return _finish(x.float() @ weight.float().t(), x, fusion)


def linear_fused_vendor(x: Tensor, weight: Tensor, fusion: Fusion = PLAIN) -> LinearOutput:
    """F.linear, which rounds once more, and the rest by torch."""
    check_linear(x, weight, fusion)
    if fusion == Fusion(bias=fusion.bias):
        return LinearOutput(F.linear(x, weight, fusion.bias))
    return _finish(F.linear(x, weight).float(), x, fusion)


def _finish(acc: Tensor, x: Tensor, fusion: Fusion) -> LinearOutput:
    if fusion.norm is not None:
        mean = fusion.norm.squares.sum(dim=1, keepdim=True) / x.shape[1]
        acc = acc * torch.rsqrt(mean + fusion.norm.eps)
    if fusion.bias is not None:
        acc = acc + fusion.bias.float()
    if fusion.silu_mul:
        gate, up = acc[:, 0::2], acc[:, 1::2]
        acc = gate * torch.sigmoid(gate) * up
    if fusion.residual is None or fusion.gamma is None:
        return LinearOutput(acc.to(x.dtype))
    y = (acc + fusion.residual.float()).to(x.dtype)
    written = y.float()
    scaled = (written * fusion.gamma.float()).to(x.dtype)
    return LinearOutput(y, scaled, written.square().sum(dim=1, keepdim=True))


def check_linear(x: Tensor, weight: Tensor, fusion: Fusion) -> None:
    """ValueError naming the tensor that does not fit."""
    expect("weight", weight, (None, None))
    expect_contiguous("weight", weight)
    n, k = weight.shape
    expect("x", x, (None, k), weight.dtype)
    if x.stride(1) != 1:
        raise ValueError(f"x: expected a last stride of 1, got {x.stride(1)}")
    if (fusion.residual is None) != (fusion.gamma is None):
        raise ValueError("gamma: expected together with a residual, and only then")
    if fusion.silu_mul and (n % 2 or fusion.residual is not None):
        raise ValueError("silu_mul: expected an even number of rows in weight, and no residual")
    for name in ("bias", "gamma"):
        vector = getattr(fusion, name)
        if vector is not None:
            expect(name, vector, (n,), FLOATING_DTYPES)
            expect_contiguous(name, vector)
    if fusion.residual is not None:
        expect("residual", fusion.residual, (x.shape[0], n), x.dtype)
        expect_contiguous("residual", fusion.residual)
    if fusion.norm is not None:
        expect("squares", fusion.norm.squares, (x.shape[0], None), torch.float32)
        expect_contiguous("squares", fusion.norm.squares)
