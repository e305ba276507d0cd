"""Two ways through a decoder's layers, which compute the same thing. In each layer

    x = x + attention(rms_norm(x));   x = x + mlp(rms_norm(x))

`PlainChain` launches a kernel for each operation: norm, product, activation. It is all that most
backends have. `FusedChain` folds norms, activation and residual additions into the products
(`kernels/matmul_fused.py`). With the append to the cache in the kernel of attention
(`kernels/append_attention.py`) a decode step then has six kernels a layer:

    qkv, with the norm in front of it      append and attention      the merge of attention's splits
    o + residual      gate_up, with norm and silu * up      down + residual

A decode step has little work in each kernel, and pays for every boundary between two. A prefill
does not: there the vendor's product is the faster one, which has no place for what is folded in. So
the decoder takes the fused chain for steps with few tokens, as far as it was measured to be faster
(`rows`), and the plain one for the others; both use the same weights. In deterministic serving the
fused chain takes all, as its products give a row the same bits whatever the rows.

T tokens, E hidden, H query heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from millrace.engine.models.layers import LayerWeights
from millrace.kernels.dispatch import Operations
from millrace.kernels.matmul_fused import Fusion, InputNorm, LinearOutput

if TYPE_CHECKING:  # it needs triton, which is not everywhere
    from millrace.kernels.linear_choice import FusedLinear

Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, its qkv [T, (H + 2G) D]) -> [T, H D]; K and V are in the cache after."""


@dataclass(frozen=True, slots=True)
class PlainChain:
    """A kernel for each operation."""

    layers: Sequence[LayerWeights]
    final_norm: torch.Tensor  # [E]
    operations: Operations
    eps: float

    def __call__(self, residual: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Embedded tokens [T, E] to normed hidden states [T, E]."""
        ops, eps = self.operations, self.eps
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            x = layer.output(attend(index, layer.qkv(x)))
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x), ops.interleaved))
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        return x


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer's products, as `fused_model.fuse` makes them."""

    weights: LayerWeights
    qkv: FusedLinear
    output: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear


@dataclass(frozen=True, slots=True)
class FusedChain:
    """Six kernels a layer. The first norm and the last stand alone."""

    layers: Sequence[FusedLayer]
    final_norm: torch.Tensor  # [E]
    operations: Operations
    eps: float

    @property
    def rows(self) -> int:
        """Tokens of a step up to which no product falls back to the vendor's."""
        return min(
            linear.triton_rows
            for layer in self.layers
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )

    def __call__(self, residual: torch.Tensor, attend: Attend) -> torch.Tensor:
        """As `PlainChain`. Between layers x is residual * gamma, and its norm is still to be
        divided out."""
        x = self.operations.rms_norm(residual, self.layers[0].weights.attention_norm, self.eps)
        norm: InputNorm | None = None
        next_norms = [layer.weights.attention_norm for layer in self.layers[1:]]
        next_norms.append(self.final_norm)
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            weights = layer.weights
            qkv = layer.qkv(x, Fusion(weights.qkv.bias, norm)).y
            fusion = Fusion(weights.output.bias, residual=residual, gamma=weights.mlp_norm)
            residual, x, norm = self._added(layer.output(attend(index, qkv), fusion))
            x = layer.gate_up(x, Fusion(weights.gate_up.bias, norm, silu_mul=True)).y
            fusion = Fusion(weights.down.bias, residual=residual, gamma=next_norm)
            residual, x, norm = self._added(layer.down(x, fusion))
        return self.operations.rms_norm(residual, self.final_norm, self.eps)

    def _added(self, made: LinearOutput) -> tuple[torch.Tensor, torch.Tensor, InputNorm]:
        """The new residual, and what the next product reads: x and the norm in front of it."""
        assert made.scaled is not None and made.squares is not None, "made with a residual"
        return made.y, made.scaled, InputNorm(made.squares, self.eps)
