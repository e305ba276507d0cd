"""From a Hugging Face config.json to a ModelConfig: the one table that a new architecture joins.

Millrace runs the Llama family: a decoder of pre-norm attention and gated-MLP layers. Members
differ in the fields of ModelConfig alone, so an architecture here is a function from config.json's
keys to those fields, and `decoder.py` never asks for a model's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millrace.engine.errors import UnsupportedModel
from millrace.kernels.rope import RopeScaling, yarn_attention_factor

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder. Sizes in elements, windows and contexts in tokens."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before RoPE
    windows: tuple[int | None, ...]  # by layer: a token sees this many positions up to its own
    eos_ids: tuple[int, ...]

    @property
    def window(self) -> int | None:
        """Positions that the widest layer sees; None: some layer sees all of them."""
        widths = [width for width in self.windows if width is not None]
        return max(widths) if len(widths) == self.num_layers else None

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def model_config(config: Config, generation_config: Config) -> ModelConfig:
    """Read `config`; raises UnsupportedModel naming what Millrace doesn't run."""
    names = config.get("architectures") or ["(none)"]
    try:
        features = ARCHITECTURES[names[0]]
    except KeyError as error:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"architecture {names[0]}; Millrace runs {known}") from error
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {config['hidden_act']!r}; Millrace runs silu")
    try:
        return _read(names[0], config, features(config), _eos_ids(config, generation_config))
    except KeyError as error:
        raise UnsupportedModel(f"config.json lacks {error.args[0]!r}") from error


def _read(name: str, config: Config, features: Config, eos_ids: tuple[int, ...]) -> ModelConfig:
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    window = features.pop("window", lambda layer: None)
    theta, scaling = _rope(config)
    return ModelConfig(
        architecture=name,
        num_layers=num_layers,
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_context=_max_context(config, scaling),
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        windows=tuple(window(layer) for layer in range(num_layers)),
        eos_ids=eos_ids,
        **features,
    )


# ------------------------------------------------------------------ architectures


def _llama(config: Config) -> Config:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": mlp_bias, "qk_norm": False}


def _mistral(config: Config) -> Config:
    window = config.get("sliding_window")
    plain = {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False}
    return plain | {"window": lambda layer: window}


def _qwen2(config: Config) -> Config:
    return {
        "qkv_bias": True,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "window": _qwen_window(config),
    }


def _qwen3(config: Config) -> Config:
    bias = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": False,
        "qk_norm": True,
        "window": _qwen_window(config),
    }


def _qwen_window(config: Config) -> Callable[[int], int | None]:
    """Qwen's layers from max_window_layers on slide, if use_sliding_window says so."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is not None:
        return lambda layer: window if kinds[layer] == "sliding_attention" else None
    first = config.get("max_window_layers", 0)
    return lambda layer: window if layer >= first else None


ARCHITECTURES: dict[str, Callable[[Config], Config]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


# ------------------------------------------------------------------ parts of a config


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). transformers 5 writes both into `rope_parameters`, older ones apart."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position=int(parameters["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return theta, _yarn(parameters, config)
    raise UnsupportedModel(f"rope_type {kind!r}; Millrace runs default, linear, llama3 and yarn")


def _yarn(parameters: Config, config: Config) -> RopeScaling:
    """YaRN's fields, each optional but the factor; transformers' defaults are RopeScaling's."""
    factor, sharpness = float(parameters["factor"]), parameters.get("attention_factor")
    if sharpness is None:
        weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
        sharpness = yarn_attention_factor(factor, *weights)
    length = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=int(length),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(sharpness),
    )


def _max_context(config: Config, scaling: RopeScaling | None) -> int:
    """With YaRN what it stretches to: Qwen's files then still say what the model was trained on."""
    stated = int(config["max_position_embeddings"])
    if scaling is None or scaling.kind != "yarn":
        return stated
    return max(stated, int(scaling.factor * scaling.original_max_position))


def _eos_ids(config: Config, generation_config: Config) -> tuple[int, ...]:
    """End-of-sequence ids of both files: an int, a list or null each."""
    ids: list[int] = []
    for source in (generation_config, config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))
