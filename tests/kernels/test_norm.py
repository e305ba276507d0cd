"""RMSNorm against transformers' module and against its own definition."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from millrace.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (17, 576), (63, 80), (5, 3, 64)], ids=str)
def test_rms_norm_has_the_bits_of_transformers(shape, dtype):
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    module = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    module.weight.data = weight
    expected = module(x).detach()
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), expected)
    # The fused form may sum in another order: one step of the dtype at most.
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), expected, rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_returns_the_norm_and_the_sum_and_changes_neither_input(dtype):
    x, residual = torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype)
    weight = torch.randn(96).to(dtype)
    before = x.clone(), residual.clone()
    y, new_residual = add_rms_norm(x, residual, weight, 1e-6)
    expected_y, expected_residual = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(new_residual, expected_residual)
    torch.testing.assert_close(y, expected_y, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_a_row_is_normalised_alike_alone_and_among_others():
    x, weight = torch.randn(64, 576), torch.randn(576)
    together = rms_norm(x, weight, 1e-5)
    for i_row in (0, 31, 63):
        assert torch.equal(rms_norm(x[i_row : i_row + 1], weight, 1e-5)[0], together[i_row])


def test_strided_and_empty_inputs_are_normalised():
    x, weight = torch.randn(9, 4, 2 * 64)[:, :, :64], torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert rms_norm(torch.empty(0, 64), weight, 1e-5).shape == (0, 64)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(32), r"weight: expected \[64\] of float32, got \[32\] of float32"),
        (torch.ones(64, dtype=torch.bfloat16), r"weight: expected .* got \[64\] of bfloat16"),
    ],
    ids=["shape", "dtype"],
)
def test_a_weight_that_does_not_fit_is_named(weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.randn(2, 64), weight, 1e-5)


def test_a_residual_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match="residual: expected"):
        add_rms_norm(torch.randn(4, 8), torch.randn(1, 8), torch.ones(8), 1e-5)
