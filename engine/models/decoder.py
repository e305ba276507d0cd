"""Decoder (6 of 8): the forward pass of the Llama family; it reads nothing but its arguments.

Knows nothing of requests, slots' owners or sampling. Before it: engine/runner/runner.py, which
builds the ForwardBatch. After it: kernels/attention.py, and kernels/sampling.py for the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from millrace.engine.models.chains import FusedChain, FusedLayer, PlainChain
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.models.layers import Progress, WeightLoader, load_layers
from millrace.engine.models.registry import ModelConfig
from millrace.engine.weights.checkpoint import Checkpoint
from millrace.kernels.dispatch import Operations
from millrace.kernels.kv_append import rope_table
from millrace.kernels.sampling import SampledTokens
from millrace.kernels.slot_sampling import SlotSampling

if TYPE_CHECKING:  # it needs triton, which is not everywhere
    from millrace.kernels.fused_model import FusedHead

__all__ = ["Decoder", "Progress"]

GPU_LOADING_THREADS = 8  # they wait for the disk more than they work
CPU_LOADING_THREADS = 1  # packing a weight keeps every core busy by itself


class Decoder:
    """Weights of one model on one device, in one dtype, packed for one set of operations."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        operations: Operations,
        dtype: torch.dtype,
        device: torch.device,
        max_context: int,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self._operations = operations
        loader = WeightLoader(checkpoint, operations, dtype, device)
        vocab, hidden = config.vocab_size, config.hidden_size
        self._embedding = loader.tensor("model.embed_tokens.weight", vocab, hidden)  # [V, E]
        threads = GPU_LOADING_THREADS if device.type == "cuda" else CPU_LOADING_THREADS
        self._layers = load_layers(loader, config, threads, progress)
        final_norm = loader.tensor("model.norm.weight", hidden)
        self._plain = PlainChain(self._layers, final_norm, operations, config.rms_norm_eps)
        if config.tied_embeddings:
            self._head = operations.pack_linear(self._embedding, None)
        else:
            self._head = loader.linear("", {"lm_head": vocab}, hidden, bias=False)
        self._fused, self._fused_head = self._fuse(final_norm)
        self.num_parameters = loader.num_parameters
        self._cos_sin = rope_table(
            config.head_dim, max_context, config.rope_theta, config.rope_scaling, device
        )
        self._scale = config.head_dim**-0.5

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Hidden states [T, E] of the batch's tokens, normed; their K and V are in `kv` after."""
        ops, config = self._operations, self.config
        block_size = kv.keys[0].shape[1]
        prepared = {
            window: ops.prepare_attention(batch.attention, block_size, window)
            for window in set(config.windows)
        }

        only_decodes = batch.attention.num_decodes == len(batch.attention.slots)

        def attend(index: int, qkv: torch.Tensor) -> torch.Tensor:
            keys, values, layer = kv.keys[index], kv.values[index], self._layers[index]
            attention = prepared[config.windows[index]]
            appended = (
                *(qkv, batch.positions, batch.write_index, self._cos_sin, keys, values),
                *(config.num_heads, layer.q_norm, layer.k_norm, config.rms_norm_eps),
            )
            if only_decodes and ops.append_attention is not None:
                out = ops.append_attention(*appended, attention, scale=self._scale)
            else:
                q = ops.kv_append(*appended)
                out = ops.paged_attention(q, keys, values, attention, scale=self._scale)
            return out.flatten(1)  # [T, H D]

        embedded = torch.nn.functional.embedding(batch.token_ids, self._embedding)  # [T, E]
        if self._fused is not None and len(embedded) <= self._fused.rows:
            return self._fused(embedded, attend)
        return self._plain(embedded, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states [N, E], in the model's dtype."""
        return self._head(hidden) if self._fused_head is None else self._fused_head(hidden)

    @property
    def draw_rows(self) -> int:
        """The most rows that `draw` takes; 0 where the logits are the faster way."""
        return 0 if self._fused_head is None else self._fused_head.draw_rows

    def draw(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        sampling: SlotSampling,
    ) -> SampledTokens:
        """The tokens at `positions` [N] of `slots` [N] from hidden states [N, E], by temperature
        alone: what `Operations.sample` draws from their logits."""
        assert self._fused_head is not None, "draw_rows says when"
        return self._fused_head.draw(hidden, slots, positions, sampling)

    def _fuse(self, final_norm: torch.Tensor) -> tuple[FusedChain | None, FusedHead | None]:
        """The fused products of the same weights, where the operations have such."""
        if self._operations.fuse is None:
            return None, None
        packed = [(of.qkv, of.output, of.gate_up, of.down) for of in self._layers]
        weights = [linear.weight for layer in packed for linear in layer]
        made = self._operations.fuse(weights, self._head.weight)
        layers = [
            FusedLayer(layer, *made.linears[4 * index : 4 * index + 4])
            for index, layer in enumerate(self._layers)
        ]
        chain = FusedChain(layers, final_norm, self._operations, self.config.rms_norm_eps)
        return chain, made.head
