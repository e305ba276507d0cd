"""Models of a published shape with random weights, made on the device: no files, no download.

Speed depends on shapes, not on values. Each tensor is drawn on the device, from a seed of its own
name, so that two models of one shape are equal.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

STD = 0.02  # of weights, as models are initialised

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _llama(hidden: int, ffn: int, layers: int, heads: int, **special: Any) -> dict[str, Any]:
    """A config.json of the Llama family."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | special


SHAPES = {
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, tie_word_embeddings=True),
}
SMALL = _llama(512, 1024, 4, 8, num_key_value_heads=2, vocab_size=4096, rope_parameters=PLAIN_ROPE)
TINY = _llama(
    64,
    96,
    2,
    4,
    num_key_value_heads=2,
    vocab_size=301,
    max_position_embeddings=512,
    rope_parameters=PLAIN_ROPE,
)


class RandomCheckpoint:
    """A Checkpoint (engine/weights/checkpoint.py) of random tensors on a device."""

    def __init__(
        self, config: dict[str, Any], device: torch.device, dtype: torch.dtype, std: float = STD
    ) -> None:
        self.config = config
        self.generation_config: dict[str, Any] = {}
        self._device = device
        self._dtype = dtype
        self._std = std
        self._shapes = shapes_of(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        """Ones for a norm, else normal numbers; the same for each call."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, device=self._device, dtype=self._dtype)
        return drawn.normal_(0.0, self._std, generator=generator)


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama without biases, by its name in Hugging Face's checkpoints."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    embedding = (config["vocab_size"], hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = embedding
    return shapes


def parameters_read(config: dict[str, Any]) -> int:
    """Weight elements that a decode step reads: of an embedding it only looks up rows."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes_of(config).items()}
    if not config["tie_word_embeddings"]:
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values())
