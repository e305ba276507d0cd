"""The real built-in model, against the gguf package's reader and transformers' row order."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.gguf_header import read_gguf_metadata
from millrace.engine.weights.locate import resolve

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def location():
    return resolve(None)


@pytest.fixture(scope="module")
def reader(location):
    return GGUFReader(location.path)


def test_its_configuration_is_that_of_smollm2_135m(location) -> None:
    checkpoint = open_checkpoint(location.path)
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: checkpoint.config[key] for key in facts} == facts
    assert "rope_scaling" not in checkpoint.config
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_its_tokenizer_is_in_the_metadata(location) -> None:
    metadata = read_gguf_metadata(location.path)
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert "<|im_start|>" in metadata["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("name", "gguf_name"),
    [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q"),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
        ("model.layers.29.self_attn.v_proj", "blk.29.attn_v"),
        ("model.layers.29.mlp.down_proj", "blk.29.ffn_down"),
        ("model.norm", "output_norm"),
    ],
)
def test_its_tensors_are_what_transformers_makes_of_them(
    location, reader, name: str, gguf_name: str
) -> None:
    checkpoint = open_checkpoint(location.path)
    [stored] = [tensor for tensor in reader.tensors if tensor.name == gguf_name + ".weight"]
    decoded = dequantize(stored.data, stored.tensor_type)
    expected, _, _ = LlamaTensorProcessor(checkpoint.config).process(decoded, stored.name)
    np.testing.assert_array_equal(checkpoint.load(name + ".weight").numpy(), expected)
