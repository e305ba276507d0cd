"""GGUF metadata as a Hugging Face configuration, for the architectures that Millrace runs.

Keys and their defaults are those of llama.cpp (`llama-arch.cpp`, `llm_load_hparams`), which defines
what a GGUF file means. Anything that would change the computation in a way that the decoder does
not do is refused here, not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.engine.errors import UnsupportedModel, WeightsError

# GGUF's architecture, which is also Hugging Face's model_type; Mistral and SmolLM2 call it llama.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
DEFAULT_ROPE_THETA = 10000.0
MAX_SIZE = 2**31 - 1  # of any dimension or count


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: Path
) -> dict[str, Any]:
    """Return the model's configuration in the keys of a config.json.

    `shapes` are the tensors' by GGUF name: the vocabulary's size, tied embeddings and biases show
    in them alone. Raises UnsupportedModel or WeightsError naming the key or tensor.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file}: architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(file, metadata, arch)
    if keys.integer("expert_count", 0):
        raise UnsupportedModel(f"{file}: {arch}.expert_count: mixtures of experts are not served")
    vocab_size = _vocab_size(shapes, file)
    config: dict[str, Any] = {
        "model_type": arch,
        "architectures": [ARCHITECTURES[arch]],
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    config |= _attention(keys, config["hidden_size"])
    config |= _rope(keys, config["head_dim"], ROPE_FACTORS in shapes)
    config |= special_tokens(metadata, vocab_size)
    return config


def special_tokens(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return bos_token_id and eos_token_id, those that the file has; eos is a list if several.

    An id outside the vocabulary could never be sampled; some files write -1 for "none" that way.
    """

    def read(name: str) -> list[int]:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return [value] if isinstance(value, int) and 0 <= value < vocab_size else []

    tokens: dict[str, Any] = {}
    if bos := read("bos"):
        tokens["bos_token_id"] = bos[0]
    if ends := list(dict.fromkeys(read("eos") + read("eot") + read("eom"))):
        tokens["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return tokens


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata under one architecture's prefix, checked as it is read."""

    file: Path
    metadata: Mapping[str, Any]
    arch: str

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a size; llama.cpp lets some be a list, one for each layer: those must agree."""
        value = self._value(key, default)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise UnsupportedModel(f"{self.file}: {self.arch}.{key} differs between layers")
            value = value[0]
        lowest = 1 if default is None else min(default, 1)
        if type(value) is not int or not lowest <= value <= MAX_SIZE:
            raise WeightsError(f"{self.file}: {self.arch}.{key} is {value!r}, not a valid size")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive float, as the shortest decimal that its 32 bits stand for."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise WeightsError(f"{self.file}: {self.arch}.{key} is {value!r}, not above zero")
        return float(f"{value:.7g}")

    def text(self, key: str, default: str) -> str:
        """Read a string."""
        return str(self._value(key, default))

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise WeightsError(f"{self.file}: {self.arch}.{key} is missing")
        return value


def _vocab_size(shapes: Mapping[str, tuple[int, ...]], file: Path) -> int:
    if "token_embd.weight" not in shapes:
        raise WeightsError(f"{file}: tensor token_embd.weight is missing")
    return shapes["token_embd.weight"][0]


def _attention(keys: _Keys, hidden_size: int) -> dict[str, Any]:
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if kv_heads < 1 or heads % kv_heads:
        raise WeightsError(
            f"{keys.file}: {keys.arch}.attention.head_count {heads} does not divide by "
            f"head_count_kv {kv_heads}"
        )
    head_dim = keys.integer("attention.key_length", hidden_size // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(
            f"{keys.file}: {keys.arch}.attention.value_length is not the key_length {head_dim}"
        )
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    if window := keys.integer("attention.sliding_window", 0):
        config["sliding_window"] = window
    return config


def _rope(keys: _Keys, head_dim: int, has_factors: bool) -> dict[str, Any]:
    """Return rope_theta and any scaling.

    llama.cpp folds Llama 3's scaling into a tensor of one divisor for each frequency; the file has
    no other trace of it. `rope_freq_factors` says that the tensor "rope_freqs.weight" [head_dim/2]
    is there and that frequency i is `rope_theta ** (-2i / head_dim) / factor[i]`.
    """
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(
            f"{keys.file}: {keys.arch}.rope.dimension_count is not the head's size {head_dim}: "
            "partial rotary embeddings are not served"
        )
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", DEFAULT_ROPE_THETA)}
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedModel(f"{keys.file}: {keys.arch}.rope.scaling.type {kind!r} is not served")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if has_factors:
        config["rope_freq_factors"] = True
    return config
