from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from millrace.engine.errors import ModelError, UnsupportedModel, WeightsError
from millrace.engine.weights.gguf_config import read_config

FILE = Path("some.gguf")
SHAPES = {"token_embd.weight": (128, 64), "output.weight": (128, 64), "blk.0.x": (1,)}


def llama(arch: str = "llama", **changes):
    keys = {
        "block_count": 2,
        "context_length": 8192,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "rope.freq_base": 500000.0,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"{arch}.{key}": value for key, value in keys.items() if value is not None}
    return metadata | {"general.architecture": arch}


def read(metadata, shapes=SHAPES, factors=None):
    return read_config(metadata, shapes, factors, FILE)


def test_sizes_become_the_keys_of_a_config_json() -> None:
    config = read(llama())
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500000.0,
    }


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_is_named_as_in_transformers(arch: str) -> None:
    config = read(llama(arch, attention__key_length=32, attention__value_length=32))
    assert config["model_type"] == arch
    assert config["architectures"] == [f"Qwen{arch[-1]}ForCausalLM"]
    assert config["head_dim"] == 32  # its own, not hidden_size / heads


def test_what_only_tensors_show_is_taken_from_them() -> None:
    shapes = {
        "token_embd.weight": (50, 64),
        "blk.0.attn_q.bias": (64,),
        "blk.0.ffn_up.bias": (96,),
    }
    config = read(llama(), shapes)
    assert config["vocab_size"] == 50
    assert config["tie_word_embeddings"] is True
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True


def test_defaults_are_those_of_llama_cpp() -> None:
    config = read(llama(attention__head_count_kv=None, rope__freq_base=None))
    assert config["num_key_value_heads"] == 4
    assert config["rope_theta"] == 10000.0


def test_sizes_by_layer_are_read_if_they_agree() -> None:
    assert read(llama(attention__head_count_kv=[2, 2]))["num_key_value_heads"] == 2
    with pytest.raises(UnsupportedModel, match="head_count_kv differs between layers"):
        read(llama(attention__head_count_kv=[2, 4]))


def test_several_ends_become_a_list_and_ids_beyond_the_vocabulary_none() -> None:
    ends = {
        "tokenizer.ggml.bos_token_id": 2**32 - 1,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 7,
    }
    config = read(llama() | ends)
    assert config["eos_token_id"] == [7, 9]
    assert "bos_token_id" not in config
    assert read(llama() | {"tokenizer.ggml.eos_token_id": 7})["eos_token_id"] == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 4.0},
        {"rope__scale_linear": 4.0},
    ],
)
def test_linear_scaling_in_each_spelling(changes) -> None:
    assert read(llama(**changes))["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_yarn_scaling_with_its_defaults_and_without() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    found = read(llama(**yarn))["rope_scaling"]
    assert found == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,  # context_length
    }
    full = {"rope__scaling__original_context_length": 2048, "rope__scaling__attn_factor": 0.5}
    found = read(llama(**yarn, **full))["rope_scaling"]
    assert found["original_max_position_embeddings"] == 2048
    assert found["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * math.log(4.0)))


def test_no_scaling_is_no_scaling() -> None:
    assert "rope_scaling" not in read(llama(rope__scaling__type="none", rope__scaling__factor=4.0))
    assert "rope_scaling" not in read(llama(), factors=[1.0] * 8)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama3_factors_become_the_scaling_that_transformers_made_them_from(
    factor: float, head_dim: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=scaling | {"rope_theta": 500000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    metadata = llama(attention__key_length=head_dim, attention__value_length=head_dim)

    config = read(metadata, factors=(plain / scaled).tolist())

    found = config["rope_scaling"]
    assert found.pop("factor") == pytest.approx(factor, rel=1e-6)
    scaling.pop("factor")
    assert found == scaling


@pytest.mark.parametrize(
    "factors",
    [[2.0] * 8, [1.0] * 7 + [8.0], [1.0, math.nan] * 4, [0.0] * 8, [math.inf] * 8, [1.0, 2.0]],
)
def test_other_frequency_factors_are_refused_by_name(factors) -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        read(llama(), factors=factors)


def test_a_window_makes_a_mistral_and_one_as_long_as_the_context_nothing() -> None:
    config = read(llama(attention__sliding_window=4096))
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 4096
    assert read(llama(attention__sliding_window=8192)) == read(llama())
    assert read(llama("qwen2", attention__sliding_window=64))["use_sliding_window"] is True


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_count": None}, WeightsError, "llama.block_count is missing"),
        ({"block_count": "two"}, WeightsError, "llama.block_count is 'two'"),
        ({"block_count": 2**31 - 1}, WeightsError, "2147483647 layers"),
        ({"embedding_length": 0}, WeightsError, "llama.embedding_length is 0"),
        ({"embedding_length": -64}, WeightsError, "llama.embedding_length is -64"),
        ({"embedding_length": 2**40}, WeightsError, "llama.embedding_length"),
        ({"embedding_length": 3}, WeightsError, "4 heads do not fit"),
        ({"embedding_length": True}, WeightsError, "llama.embedding_length is True"),
        ({"attention__head_count": 3}, WeightsError, "does not divide by head_count_kv 2"),
        ({"attention__head_count": []}, WeightsError, r"head_count is \[\]"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, WeightsError, "rms_epsilon is 0.0"),
        ({"rope__freq_base": math.nan}, WeightsError, "rope.freq_base is nan"),
        ({"rope__freq_base": 1e300}, WeightsError, "rope.freq_base is 1e"),
        ({"rope__scaling__type": "longrope"}, UnsupportedModel, "rope.scaling.type 'longrope'"),
        ({"rope__dimension_count": 8}, UnsupportedModel, "partial rotary"),
        ({"attention__value_length": 8}, UnsupportedModel, "value_length"),
        ({"expert_count": 8}, UnsupportedModel, "mixtures of experts"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(changes, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        read(llama(**changes))
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize("arch", [None, "mamba", ["llama"], 3])
def test_other_architectures_are_refused(arch) -> None:
    with pytest.raises(UnsupportedModel, match="is not one of llama, qwen2, qwen3"):
        read({"general.architecture": arch})


def test_a_file_without_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match=r"token_embd\.weight is missing"):
        read(llama(), {})
