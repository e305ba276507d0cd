"""Random tiny models of every family, saved as Hugging Face folders, beside transformers' own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,  # large enough that greedy choices are no near ties
}
FAMILIES = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": (transformers.LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "llama_yarn": (transformers.LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "llama_with_biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 9}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 20}),
}


@dataclass
class TinyModel:
    """A folder on disk and the reference that was saved there."""

    path: Path
    reference: transformers.PreTrainedModel


def save_tiny_model(family: str, path: Path, **sizes: int) -> TinyModel:
    """A random model of `family` in `path`, SIZES but for those given; the same each time."""
    config_class, special = FAMILIES[family]
    config = config_class(**(SIZES | special | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # biases and norms start as zeros and ones: make them matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return TinyModel(path, model)


@pytest.fixture(scope="session", params=list(FAMILIES))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Every family in turn."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """A factory of models, by family and what is not as in SIZES."""
    return lambda family, **sizes: save_tiny_model(family, tmp_path_factory.mktemp(family), **sizes)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One model, for tests of what does not depend on the family."""
    return save_tiny_model("llama3", tmp_path_factory.mktemp("llama3"))
