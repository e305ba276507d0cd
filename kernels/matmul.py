"""Linear layers whose weight is packed once, at load: y[T, N] = x[T, K] @ weight[N, K]^T + bias[N].

On a GPU the vendor library is fast with the weight as it stands. On a CPU, oneDNN multiplies a
weight that it has reordered for its registers 1.3 to 4 times as fast as torch's `F.linear` does for
the few rows of a decode step. bf16 and fp16 are multiplied natively where the CPU has the
instructions. Where it has not, torch would emulate them row by row: the weight is then widened to
float32 once (exact; twice the memory), x at each call, and y is rounded once at the end.

Accumulation is in float32. oneDNN sums in another order than F.linear: float32 results differ in
the last bits (both within 5e-6 of float64 for K = 576 and outputs of size 1).

`matmul_fused.py` defines layers with a norm, an activation or a residual folded in, and
`linear_choice.py` says which form of them a GPU runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import expect


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer, ready to call: x [T, in_features] -> [T, out_features], same dtype.

    `dtype` is what x must have; `weight` is an opaque oneDNN tensor where `prepacked`.
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    dtype: torch.dtype
    prepacked: bool

    def __call__(self, x: Tensor) -> Tensor:
        """ValueError where x is not [T, in_features] of `dtype`."""
        expect("x", x, (None, self.in_features), self.dtype)
        if not self.prepacked:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.weight.dtype), self.weight, self.bias, "none", [], ""
        )
        return y.to(self.dtype)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """The fastest form of this layer on the weight's device; weight [N, K], bias [N] or None.

    The CPU form copies the weight, so that the caller may drop it.
    """
    expect("weight", weight, (None, None))
    _expect_bias(weight, bias)
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return pack_linear_reference(weight, bias)
    compute_dtype = weight.dtype if _is_native(weight.dtype) else torch.float32
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(compute_dtype))
    packed_bias = None if bias is None else bias.detach().to(compute_dtype)
    out_features, in_features = weight.shape
    return PackedLinear(packed, packed_bias, in_features, out_features, weight.dtype, True)


def pack_linear_reference(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """The definition: F.linear with the weight as it stands."""
    expect("weight", weight, (None, None))
    _expect_bias(weight, bias)
    out_features, in_features = weight.shape
    return PackedLinear(weight, bias, in_features, out_features, weight.dtype, False)


def _is_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN has instructions for `dtype` on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _expect_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        expect("bias", bias, (weight.shape[0],), weight.dtype)
