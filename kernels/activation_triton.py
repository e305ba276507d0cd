"""Gated activations on a GPU, in Triton; `activation.py` says what they compute.

    silu_mul:       y = round(a * sigmoid(a)) * up        a = float32(gate)
    gelu_tanh_mul:  y = round(a * sigmoid(2u)) * up     u = sqrt(2 / pi) (a + 0.044715 a^3)

The second is gelu's 0.5 a (1 + tanh u): with tanh u = 2 sigmoid(2u) - 1 the ones cancel. Written
with tanh, a large negative gate loses bits in 1 + tanh u, about 2^-24 |a| of the result; written
with the sigmoid it does not, so the two differ there, and this one is nearer.

In float32, rounded to the dtype before the product. A program owns TILE elements of one row; every
element is computed alone, so its bits depend on nothing else.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.activation import expect_gate_up
from millrace.kernels.configs import LaunchConfig, launch_config

MAX_TILE = 2048
ELEMENTS_PER_WARP = 512
_GELU_SCALE = tl.constexpr(2 * (2 / torch.pi) ** 0.5)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gated_kernel(
    p_gate_up,  # [T, 2F]
    p_out,  # [T, F]
    stride_gate_up,
    FFN: tl.constexpr,
    TILE: tl.constexpr,
    GELU: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    tiles = tl.cdiv(FFN, TILE)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)  # neighbours in time are so in memory
    o_f = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    m_f = o_f < FFN
    p_row = p_gate_up + i_row * stride_gate_up
    if INTERLEAVED:  # one load of both, as they lie
        o_both = tl.program_id(0) % tiles * (2 * TILE) + tl.arange(0, 2 * TILE)
        b_both = tl.load(p_row + o_both, mask=o_both < 2 * FFN, other=0.0).to(tl.float32)
        b_gate, b_up = tl.split(tl.reshape(b_both, (TILE, 2)))
    else:
        b_gate = tl.load(p_row + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_up = tl.load(p_row + FFN + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_logit = b_gate
    if GELU:
        b_logit = _GELU_SCALE * (b_gate + _GELU_CUBIC * b_gate * b_gate * b_gate)
    b_active = (b_gate * tl.sigmoid(b_logit)).to(p_out.dtype.element_ty)
    # Products of two 16-bit floats are exact in float32: this rounds as the dtype's own product.
    b_out = b_active.to(tl.float32) * b_up
    tl.store(p_out + i_row * FFN + o_f, b_out.to(p_out.dtype.element_ty), mask=m_f)


def silu_mul(gate_up: Tensor, interleaved: bool = False) -> Tensor:
    """silu(gate) * up; gate_up [T, 2F] -> [T, F]. Rows may lie at any stride."""
    return _launch(gate_up, gelu=False, interleaved=interleaved)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up; gate_up [T, 2F] -> [T, F]. Rows may lie at any stride."""
    return _launch(gate_up, gelu=True, interleaved=False)


@cache
def gated_config(ffn: int, device: torch.device) -> LaunchConfig:
    """How rows of `ffn` results are launched: elements a program, and warps."""
    tile = min(MAX_TILE, triton.next_power_of_2(ffn))
    default = LaunchConfig(max(1, tile // ELEMENTS_PER_WARP), 1, {"TILE": tile})
    return launch_config("activation", f"F{ffn}", device, default)


def _launch(gate_up: Tensor, gelu: bool, interleaved: bool) -> Tensor:
    expect_gate_up(gate_up)
    if gate_up.stride(1) != 1:
        raise ValueError(f"gate_up: expected a last stride of 1, got {gate_up.stride(1)}")
    num_tokens, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, ffn, dtype=gate_up.dtype, device=gate_up.device)
    config = gated_config(ffn, gate_up.device)
    gated_kernel[(num_tokens * triton.cdiv(ffn, config.constants["TILE"]),)](
        gate_up,
        out,
        gate_up.stride(0),
        FFN=ffn,
        GELU=gelu,
        INTERLEAVED=interleaved,
        **config.options,
        **config.constants,
    )
    return out
