"""RMSNorm, alone and fused with the residual addition in front of it.

    y = weight * round(x32 * rsqrt(mean(x32^2) + eps))        x32 = float32(x)

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), rounded the way transformers'
LlamaRMSNorm rounds: statistics and scaling in float32, one rounding to the dtype of x, then the
product with the weight in that dtype. The mean is over the last dimension: each row is reduced
alone, and its neighbours cannot change it.

x [T, E], weight [E]; T tokens in the step, E hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import expect


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x [..., E]; returns the shape and dtype of x.

    ValueError where weight is not [E] of the dtype of x.
    """
    expect("weight", weight, (x.shape[-1],), x.dtype)
    if x.dtype == torch.float32:  # no rounding in between: the weight can be folded in
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, None, eps).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual); x and residual [T, E], neither is changed."""
    expect("residual", residual, tuple(x.shape), x.dtype)
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: `rms_norm`, one step of the formula a line."""
    x32 = x.float()
    variance = x32.pow(2).mean(dim=-1, keepdim=True)
    return weight * (x32 * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition: `add_rms_norm`."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual
