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

import numpy as np

from millrace.engine.errors import UnsupportedModel, WeightsError

# GGUF's architecture, which is also Hugging Face's model_type; Mistral and SmolLM2 call it llama.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
DEFAULT_ROPE_THETA = 10000.0
LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTOR_TOLERANCE = 1e-4  # relative; the converter computes in float32
MAX_SIZE = 2**31 - 1  # of any dimension or count
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: list[float] | None,
    file: Path,
) -> dict[str, Any]:
    """Return the model's configuration in the keys of a config.json.

    `shapes` are the tensors' by GGUF name: the vocabulary's size, tied embeddings and biases show
    in them alone. `rope_factors` is what the tensor "rope_freqs.weight" [head_dim/2] holds.
    Raises UnsupportedModel or WeightsError naming the key or tensor.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file}: architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(file, metadata, arch)
    if keys.integer("expert_count", 0):
        raise UnsupportedModel(f"{file}: {arch}.expert_count: mixtures of experts are not served")
    vocab_size = _vocab_size(shapes, file)
    layers = keys.integer("block_count")
    if layers > len(shapes):
        raise WeightsError(f"{file}: {layers} layers ({arch}.block_count) in {len(shapes)} tensors")
    config: dict[str, Any] = {
        "model_type": arch,
        "architectures": [ARCHITECTURES[arch]],
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    config |= _attention(keys, config["hidden_size"])
    config |= _window(keys, config["max_position_embeddings"])
    config |= _rope(keys, config["head_dim"], rope_factors)
    config |= special_tokens(metadata, vocab_size)
    return config


def special_tokens(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return bos_token_id and eos_token_id, those that the file has; eos is a list if several.

    An id outside the vocabulary could never be sampled; some files write -1 for "none" that way.
    """

    def read(name: str) -> list[int]:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return [value] if type(value) is int and 0 <= value < vocab_size else []

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
        if type(value) not in (int, float) or not 0 < value <= MAX_FLOAT32:
            raise WeightsError(f"{self.file}: {self.arch}.{key} is {value!r}, not above zero")
        return float(str(np.float32(value)))

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
    if heads % kv_heads:
        raise WeightsError(
            f"{keys.file}: {keys.arch}.attention.head_count {heads} does not divide by "
            f"head_count_kv {kv_heads}"
        )
    head_dim = keys.integer("attention.key_length", hidden_size // heads)
    if head_dim < 1:
        raise WeightsError(f"{keys.file}: {heads} heads do not fit a hidden size of {hidden_size}")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(
            f"{keys.file}: {keys.arch}.attention.value_length is not the key_length {head_dim}"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _window(keys: _Keys, context: int) -> dict[str, Any]:
    """A window that some position can feel, in the words of the architecture that has one."""
    window = keys.integer("attention.sliding_window", 0)
    if not 0 < window < context:
        return {}
    if keys.arch == "llama":  # a Llama with a window is a Mistral
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
        }
    return {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def _rope(keys: _Keys, head_dim: int, factors: list[float] | None) -> dict[str, Any]:
    """Return rope_theta, and rope_scaling where there is one."""
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(
            f"{keys.file}: {keys.arch}.rope.dimension_count is not the head's size {head_dim}: "
            "partial rotary embeddings are not served"
        )
    theta = keys.number("rope.freq_base", DEFAULT_ROPE_THETA)
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{keys.file}: {keys.arch}.rope.scaling.type {kind!r} is not served")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    scaling: list[dict[str, Any]] = []
    if kind == "linear" and factor != 1.0:
        scaling.append({"rope_type": "linear", "factor": factor})
    if kind == "yarn":
        scaling.append(_yarn_scaling(keys, factor))
    if factors is not None and set(factors) != {1.0}:
        scaling.append(_llama3_scaling(factors, theta, head_dim, keys.file))
    if len(scaling) > 1:
        raise UnsupportedModel(f"{keys.file}: {kind} rope scaling and {ROPE_FACTORS} together")
    return {"rope_theta": theta} | ({"rope_scaling": scaling[0]} if scaling else {})


def _yarn_scaling(keys: _Keys, factor: float) -> dict[str, Any]:
    """YaRN as llama.cpp runs it for these architectures: with the paper's beta_fast and beta_slow.

    Its attn_factor is a further one; that of config.json replaces the paper's, so holds both.
    """
    trained = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
    }
    further = keys.number("rope.scaling.attn_factor", 1.0)
    if further != 1.0:
        scaling["attention_factor"] = further * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return scaling


def _llama3_scaling(
    factors: list[float], theta: float, head_dim: int, file: Path
) -> dict[str, Any]:
    """Recover Llama 3's scaling from the tensor of divisors, one a frequency, that replaces it.

    Only `factor`, the largest divisor, differs between the models of Llama 3.1, 3.2 and 3.3; with
    it the divisors must come out as the file has them. The formula: `generate_extra_tensors` in
    llama.cpp's convert_hf_to_gguf.py, after `_compute_llama3_parameters` of transformers.
    """
    factor = max(factors)
    refusal = UnsupportedModel(f"{file}: tensor {ROPE_FACTORS} is not the scaling of Llama 3")
    if len(factors) != head_dim // 2 or not 1.0 <= factor <= MAX_FLOAT32:
        raise refusal
    low, high = LLAMA3_CONSTANTS["low_freq_factor"], LLAMA3_CONSTANTS["high_freq_factor"]
    context = LLAMA3_CONSTANTS["original_max_position_embeddings"]
    expected = []
    for index in range(head_dim // 2):
        turns = context * theta ** (-2 * index / head_dim) / (2 * math.pi)  # within the context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if not np.allclose(factors, expected, rtol=FACTOR_TOLERANCE, atol=0.0):
        raise refusal
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_CONSTANTS
