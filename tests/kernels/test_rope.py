"""The table of rotations against transformers' frequencies."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from millrace.kernels.rope import (
    RopeScaling,
    rope_frequencies,
    rope_table,
    yarn_attention_factor,
)

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(head_dim, theta, **rope):
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **rope},
    )


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_default_table_has_the_cosines_and_sines_of_transformers(head_dim):
    table = rope_table(head_dim, 300, 10000.0)
    module = LlamaRotaryEmbedding(config(head_dim, 10000.0, rope_type="default"))
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(300)[None])
    half = head_dim // 2
    assert table.dtype == torch.float32 and table.shape == (300, head_dim)
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-6)


def test_linear_frequencies_are_those_of_transformers():
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](
        config(64, 10000.0, rope_type="linear", factor=4.0), torch.device("cpu")
    )
    assert torch.equal(rope_frequencies(64, 10000.0, RopeScaling("linear", factor=4.0)), expected)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_llama3_frequencies_are_those_of_transformers(theta):
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](
        config(128, theta, rope_type="llama3", **LLAMA3), torch.device("cpu")
    )
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    actual = rope_frequencies(128, theta, scaling)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    plain = rope_frequencies(128, theta)
    assert torch.equal(actual[0], plain[0])  # short wavelengths are kept
    assert actual[-1] == plain[-1] / 32.0  # long ones are divided
    assert ((actual < plain) & (actual > plain / 32)).any()  # and some lie between


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("head_dim", "theta", "special", "fields"),
    [
        (128, 1e6, {}, {}),  # Qwen 2.5
        (64, 1e4, {"factor": 40.0, "original_max_position_embeddings": 4096}, {}),
        (80, 5e5, {"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (64, 150000.0, {"truncate": False}, {"truncate": False}),  # gpt-oss
        (64, 1e4, {"original_max_position_embeddings": 100}, {}),  # the range reaches index 0
    ],
)
def test_yarn_frequencies_are_those_of_transformers(head_dim, theta, special, fields):
    parameters = YARN | special
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](
        config(head_dim, theta, **parameters), torch.device("cpu")
    )
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    scaling = RopeScaling("yarn", factor, original_max_position=length, **fields)
    actual = rope_frequencies(head_dim, theta, scaling)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert yarn_attention_factor(factor) == attention_factor
    plain = rope_frequencies(head_dim, theta)
    torch.testing.assert_close(actual[-1], plain[-1] / factor)  # slow ones are divided
    assert ((actual < plain * 0.999) & (actual > plain / factor * 1.001)).any()


@pytest.mark.parametrize(
    "special", [{"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 0.7}, {"factor": 1.0}]
)
def test_yarn_attention_factor_is_that_of_transformers(special):
    parameters = YARN | special
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config(64, 1e4, **parameters), torch.device("cpu"))
    weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
    assert yarn_attention_factor(parameters["factor"], *weights) == expected


def test_yarn_table_has_the_cosines_and_sines_of_transformers():
    module = LlamaRotaryEmbedding(config(64, 1e4, **YARN))
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(300)[None])
    scaling = RopeScaling(
        "yarn", 4.0, original_max_position=32768, attention_factor=yarn_attention_factor(4.0)
    )
    table = rope_table(64, 300, 1e4, scaling)
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], rtol=0, atol=2e-6)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], rtol=0, atol=2e-6)


def test_factors_divide_each_frequency():
    factors = tuple(1.0 + i for i in range(8))
    scaled = rope_frequencies(16, 100.0, RopeScaling("factors", factors=factors))
    assert torch.equal(scaled, rope_frequencies(16, 100.0) / torch.tensor(factors))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((7, 10, 1e4, None), "head_dim"),
        ((0, 10, 1e4, None), "head_dim"),
        ((8, 0, 1e4, None), "max_position"),
        ((8, 10, 0.0, None), "theta"),
        ((8, 10, math.nan, None), "theta"),
        ((8, 10, 1e4, RopeScaling("linear", factor=0.0)), "scaling.factor"),
        ((8, 10, 1e4, RopeScaling("llama3", high_freq_factor=1.0)), "scaling.high_freq_factor"),
        ((8, 10, 1e4, RopeScaling("factors", factors=(1.0,))), "scaling.factors"),
        ((8, 10, 1e4, RopeScaling("factors", factors=(1.0, 1.0, 0.0, 1.0))), "scaling.factors"),
        ((8, 10, 1e4, RopeScaling("yarn", factor=-1.0)), "scaling.factor"),
        ((8, 10, 1e4, RopeScaling("yarn", beta_fast=0.5)), "scaling.beta_fast"),
        ((8, 10, 1e4, RopeScaling("yarn", original_max_position=0)), "original_max_position"),
        ((8, 10, 1e4, RopeScaling("yarn", attention_factor=0.0)), "scaling.attention_factor"),
        ((8, 10, 1.0, RopeScaling("yarn")), "theta"),
        ((8, 10, 1e4, RopeScaling("longrope")), "scaling.kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_out_of_range_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        rope_table(*arguments)
