"""ModelShape: what a model asks of memory and arithmetic, counted from its config.json."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.engine.errors import InvalidRequest
from millrace.engine.models.registry import ModelConfig, model_config


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Elements and operations. Norms and biases are left out: they are less than 0.1 %."""

    name: str
    layer_elements: int  # of all layers' matrices together
    head_elements: int  # of the one that makes logits
    embedding_elements: int  # of the one that is only looked up; 0 where it is the head
    kv_elements_per_token: int
    attention_flops_per_pair: int  # of a query and a key position, over all layers
    max_context: int
    windows: tuple[int | None, ...]  # by layer, tokens that a position sees; None: all of them

    @property
    def layers_by_width(self) -> dict[int | None, int]:
        """How many layers see so far back."""
        return dict(Counter(self.windows))

    @property
    def window(self) -> int | None:
        """Of the widest layer; None: some layer sees everything, so that no KV can go early."""
        widths = [width for width in self.windows if width is not None]
        return max(widths) if len(widths) == len(self.windows) else None

    @property
    def elements(self) -> int:
        """Of all weights in memory."""
        return self.layer_elements + self.head_elements + self.embedding_elements

    @classmethod
    def of(cls, name: str, model: ModelConfig) -> ModelShape:
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention = model.hidden_size * (2 * queries + 2 * keys)
        mlp = 3 * model.hidden_size * model.ffn_size
        table = model.vocab_size * model.hidden_size
        return cls(
            name,
            layer_elements=model.num_layers * (attention + mlp),
            head_elements=table,
            embedding_elements=0 if model.tied_embeddings else table,
            kv_elements_per_token=model.kv_elements_per_token,
            attention_flops_per_pair=4 * model.num_layers * queries,
            max_context=model.max_context,
            windows=model.windows,
        )


def _config(
    architecture: str,
    sizes: tuple[int, int, int, int, int, int],  # hidden, ffn, layers, heads, KV heads, vocabulary
    max_context: int,
    **special: Any,
) -> dict[str, Any]:
    hidden, ffn, layers, heads, kv_heads, vocab = sizes
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-5,
    } | special


LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
TIED = {"tie_word_embeddings": True}
SHAPES = {  # as published in each model's config.json
    "smollm2-135m": _config(LLAMA, (576, 1536, 30, 9, 3, 49152), 8192, **TIED),
    "llama-3.2-1b": _config(LLAMA, (2048, 8192, 16, 32, 8, 128256), 131072, **TIED),
    "llama-3.2-3b": _config(LLAMA, (3072, 8192, 28, 24, 8, 128256), 131072, **TIED),
    "llama-3.1-8b": _config(LLAMA, (4096, 14336, 32, 32, 8, 128256), 131072),
    "llama-3.1-70b": _config(LLAMA, (8192, 28672, 80, 64, 8, 128256), 131072),
    "mistral-7b-v0.1": _config(
        *(MISTRAL, (4096, 14336, 32, 32, 8, 32000), 32768), sliding_window=4096
    ),
    "mistral-7b": _config(MISTRAL, (4096, 14336, 32, 32, 8, 32768), 32768),
    "qwen2.5-7b": _config(QWEN2, (3584, 18944, 28, 28, 4, 152064), 32768),
    "qwen3-8b": _config(QWEN3, (4096, 12288, 36, 32, 8, 151936), 40960, head_dim=128),
}


def shape_named(name: str) -> ModelShape:
    """A published model, or the path of a config.json.

    Raises InvalidRequest for what is neither, UnsupportedModel for what Millrace does not run.
    """
    config = SHAPES.get(name.lower())
    if config is None:
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        limit = f"the path of a config.json, or one of {', '.join(SHAPES)}"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"model shape {name!r}: {error}; give {limit}"
            raise InvalidRequest(message, "model_shape", limit) from error
        if not isinstance(config, dict):
            raise InvalidRequest(f"{path} is not a JSON object", "model_shape", limit)
    return ModelShape.of(name, model_config(config, {}))
