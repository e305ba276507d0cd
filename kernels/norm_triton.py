"""RMSNorm on a GPU, in Triton; `norm.py` says what it computes and where it rounds.

    y = weight * round(x32 * rsqrt(mean(x32^2) + eps))        x32 = float32(x + residual)

A program holds whole rows in registers, so each input is read once and each output written once:
the row is summed, scaled and stored from the same registers. Wide rows have a program each, narrow
ones (E <= 1024) share one, TILE elements in all, or there would be too few bytes in flight.

Statistics are in float32. The shape of a program, and with it the order of the sum, follows from E
alone; a row of a tile is reduced by the same steps as every other row of it. So a row has the same
bits alone as among others, wherever it stands.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.checks import expect
from millrace.kernels.configs import LaunchConfig, launch_config

MAX_HIDDEN = 16384  # the widest row that fits the registers of a program
TILE = 2048  # elements of a program that holds several rows
ELEMENTS_PER_WARP = 512
MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])  # one binary, whatever the number of tokens
def rms_norm_kernel(
    p_x,  # [T, E]
    p_residual,  # [T, E], with ADD
    p_weight,  # [E]
    p_y,  # [T, E]
    p_sum,  # [T, E], with ADD
    num_rows,
    stride_x,
    stride_residual,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < HIDDEN
    m_x = (o_row < num_rows)[:, None] & m_e[None, :]
    o_y = o_row[:, None] * HIDDEN + o_e[None, :]
    dtype = p_y.dtype.element_ty

    p_rows = p_x + o_row[:, None] * stride_x + o_e[None, :]
    b_x = tl.load(p_rows, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_E]
    b_weight = tl.load(p_weight + o_e, mask=m_e, other=0.0).to(tl.float32)
    if ADD:
        p_rows = p_residual + o_row[:, None] * stride_residual + o_e[None, :]
        b_sum = (b_x + tl.load(p_rows, mask=m_x, other=0.0).to(tl.float32)).to(dtype)
        tl.store(p_sum + o_y, b_sum, mask=m_x)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / HIDDEN + eps)  # [ROWS]
    # Products of two 16-bit floats are exact in float32: this rounds as the dtype's own product.
    b_y = (b_x * b_scale[:, None]).to(dtype).to(tl.float32) * b_weight[None, :]
    tl.store(p_y + o_y, b_y.to(dtype), mask=m_x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x [..., E]; returns the shape and dtype of x.

    Rows may lie at any stride; ValueError where a row is not contiguous, or weight does not fit.
    """
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual); x and residual [T, E], neither is changed."""
    expect("residual", residual, tuple(x.shape), x.dtype)
    y, new_residual = _launch(x, residual, weight, eps)
    assert new_residual is not None, "made from the residual"
    return y, new_residual


@cache
def norm_config(hidden: int, device: torch.device) -> LaunchConfig:
    """How rows of `hidden` elements are launched: rows a program, and warps."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, TILE // block)
    num_warps = min(MAX_WARPS, rows * block // ELEMENTS_PER_WARP)
    default = LaunchConfig(num_warps, 1, {"ROWS": rows})
    return launch_config("norm", f"E{hidden}", device, default)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    hidden = x.shape[-1]
    expect("weight", weight, (hidden,), x.dtype)
    if hidden > MAX_HIDDEN:
        raise ValueError(f"x: expected at most {MAX_HIDDEN} elements a row, got {hidden}")
    rows = _rows("x", x)
    others = None if residual is None else _rows("residual", residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = None if residual is None else torch.empty_like(y)
    config = norm_config(hidden, x.device)
    rms_norm_kernel[(triton.cdiv(len(rows), config.constants["ROWS"]),)](
        rows,
        others,
        weight,
        y,
        new_residual,
        len(rows),
        rows.stride(0),
        0 if others is None else others.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK_E=triton.next_power_of_2(hidden),
        ADD=residual is not None,
        **config.options,
        **config.constants,
    )
    return y, new_residual


def _rows(name: str, x: Tensor) -> Tensor:
    """x [..., E] as [T, E]: a view where its leading dimensions fold into one, else a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {x.stride(-1)}")
    return x.reshape(-1, x.shape[-1])
