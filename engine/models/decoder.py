"""Decoder (6 of 8): the forward pass of the Llama family; it reads nothing but its arguments.

Knows nothing of requests, slots' owners or sampling. Before it: engine/runner/runner.py, which
builds the ForwardBatch. After it: kernels/attention.py, and kernels/sampling.py for the logits.
"""

from __future__ import annotations

import torch

from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.models.layers import Progress, WeightLoader, load_layers
from millrace.engine.models.registry import ModelConfig
from millrace.engine.weights.checkpoint import Checkpoint
from millrace.kernels.dispatch import Operations
from millrace.kernels.kv_append import rope_table

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
        self._norm = loader.tensor("model.norm.weight", hidden)
        if config.tied_embeddings:
            self._head = operations.pack_linear(self._embedding, None)
        else:
            self._head = loader.linear("", {"lm_head": vocab}, hidden, bias=False)
        self.num_parameters = loader.num_parameters
        self._cos_sin = rope_table(
            config.head_dim, max_context, config.rope_theta, config.rope_scaling, device
        )
        self._scale = config.head_dim**-0.5

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Hidden states [T, E] of the batch's tokens, normed; their K and V are in `kv` after."""
        ops, eps = self._operations, self.config.rms_norm_eps
        block_size = kv.keys[0].shape[1]
        prepared = {
            window: ops.prepare_attention(batch.attention, block_size, window)
            for window in set(self.config.windows)
        }
        residual = torch.nn.functional.embedding(batch.token_ids, self._embedding)  # [T, E]
        x = ops.rms_norm(residual, self._layers[0].attention_norm, eps)
        following = [layer.attention_norm for layer in self._layers[1:]] + [self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, following, strict=True)):
            keys, values = kv.keys[index], kv.values[index]
            q = ops.kv_append(
                layer.qkv(x),
                batch.positions,
                batch.write_index,
                self._cos_sin,
                keys,
                values,
                self.config.num_heads,
                layer.q_norm,
                layer.k_norm,
                eps,
            )  # [T, H, D]
            window = self.config.windows[index]
            attended = ops.paged_attention(q, keys, values, prepared[window], scale=self._scale)
            x = layer.output(attended.flatten(1))
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states [N, E], in the model's dtype."""
        return self._head(hidden)
