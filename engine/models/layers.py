"""One decoder layer: its weights, and its pass over a step's tokens.

    x = x + attention(rms_norm(x));   x = x + mlp(rms_norm(x))

Projections that read the same input are one matrix: q, k and v; gate and up.
Shapes: T tokens, E hidden, F ffn, H query heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from millrace.engine.models.registry import ModelConfig
from millrace.engine.models.upload import uploader
from millrace.engine.weights.checkpoint import Checkpoint, take
from millrace.kernels.dispatch import Operations
from millrace.kernels.matmul import PackedLinear

Progress = Callable[[str, int, int], None]  # what was loaded, how many of, how many


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Packed for the backend by `Operations.pack_linear`."""

    attention_norm: torch.Tensor  # [E]
    qkv: PackedLinear  # E -> (H + 2G) D
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    output: PackedLinear  # H D -> E
    mlp_norm: torch.Tensor  # [E]
    gate_up: PackedLinear  # E -> 2F
    down: PackedLinear  # F -> E


class WeightLoader:
    """Takes tensors by name and shape from a checkpoint, in one dtype and on one device.

    Threads may share it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        operations: Operations,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._checkpoint = checkpoint
        self._operations = operations
        self._dtype = dtype
        self._upload = uploader(device)
        self._sizes: dict[str, int] = {}  # by name: several threads load

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor; WeightsError names it if it is missing or of another shape."""
        loaded = take(self._checkpoint, name, shape)
        self._sizes[name] = loaded.numel()
        return self._upload(loaded).to(self._dtype).contiguous()

    @property
    def num_parameters(self) -> int:
        """Elements loaded so far."""
        return sum(self._sizes.values())

    def linear(self, prefix: str, outputs: dict[str, int], inputs: int, bias: bool) -> PackedLinear:
        """The named projections of one input, stacked into a single packed matrix."""
        weights = [self.tensor(f"{prefix}{n}.weight", size, inputs) for n, size in outputs.items()]
        biases = [self.tensor(f"{prefix}{n}.bias", size) for n, size in outputs.items() if bias]
        stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
        return self._operations.pack_linear(stacked, torch.cat(biases) if biases else None)


def load_layers(
    loader: WeightLoader, config: ModelConfig, threads: int, progress: Progress | None = None
) -> list[LayerWeights]:
    """All layers in order, several at a time; the first error ends the loading."""
    layers = []
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        loading = [pool.submit(load_layer, loader, config, i) for i in range(config.num_layers)]
        try:
            for index, future in enumerate(loading):
                layers.append(future.result())
                if progress is not None:
                    progress(f"layer {index}", index + 1, config.num_layers)
        finally:
            pool.shutdown(cancel_futures=True)
    return layers


def load_layer(loader: WeightLoader, config: ModelConfig, index: int) -> LayerWeights:
    """Layer `index` of a checkpoint with Hugging Face's tensor names."""
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return LayerWeights(
        attention_norm=loader.tensor(prefix + "input_layernorm.weight", hidden),
        qkv=loader.linear(attention, qkv, hidden, config.qkv_bias),
        q_norm=loader.tensor(attention + "q_norm.weight", dim) if config.qk_norm else None,
        k_norm=loader.tensor(attention + "k_norm.weight", dim) if config.qk_norm else None,
        output=loader.linear(attention, {"o_proj": hidden}, queries, config.output_bias),
        mlp_norm=loader.tensor(prefix + "post_attention_layernorm.weight", hidden),
        gate_up=loader.linear(mlp, {"gate_proj": ffn, "up_proj": ffn}, hidden, config.mlp_bias),
        down=loader.linear(mlp, {"down_proj": hidden}, ffn, config.mlp_bias),
    )
