"""The weights of a decoder's layers, from a checkpoint to what the operations take.

Projections that read the same input are one matrix: q, k and v; gate and up. Where the operations
have fused products, the rows of gate and up alternate, which those need and the others do not mind:
each weight exists once. `chains.py` has what is done with them.

Shapes: E hidden, F ffn, H query heads, G KV heads, D head dimension.
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
from millrace.kernels.matmul_fused import interleave_gate_up

Progress = Callable[[str, int, int], None]  # what was loaded, how many of, how many
Stack = Callable[[list[torch.Tensor]], torch.Tensor]


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

    def linear(
        self,
        prefix: str,
        outputs: dict[str, int],
        inputs: int,
        bias: bool,
        stack: Stack = torch.cat,
    ) -> PackedLinear:
        """The named projections of one input, stacked into a single packed matrix."""
        weights = [self.tensor(f"{prefix}{n}.weight", size, inputs) for n, size in outputs.items()]
        biases = [self.tensor(f"{prefix}{n}.bias", size) for n, size in outputs.items() if bias]
        stacked = weights[0] if len(weights) == 1 else stack(weights)
        return self._operations.pack_linear(stacked, stack(biases) if biases else None)

    def gate_up(self, prefix: str, ffn: int, inputs: int, bias: bool) -> PackedLinear:
        """gate and up, one below the other, or row by row for fused products."""
        outputs = {"gate_proj": ffn, "up_proj": ffn}
        stack = _alternating if self._operations.interleaved else torch.cat
        return self.linear(prefix, outputs, inputs, bias, stack)


def _alternating(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    gate, up = gate_and_up
    return interleave_gate_up(gate, up)


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
        gate_up=loader.gate_up(mlp, ffn, hidden, config.mlp_bias),
        down=loader.linear(mlp, {"down_proj": hidden}, ffn, config.mlp_bias),
    )
