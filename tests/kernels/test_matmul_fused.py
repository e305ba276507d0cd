"""Fused linear layers: the definition against the unfused operations, the vendor's against it."""

from dataclasses import replace

import pytest
import torch

from millrace.kernels.activation import silu_mul_reference
from millrace.kernels.matmul_fused import (
    Fusion,
    InputNorm,
    interleave_gate_up,
    linear_fused_reference,
    linear_fused_vendor,
)
from millrace.kernels.norm import rms_norm_reference

EPS = 1e-5
# Relative to outputs of size 1. The vendor's form rounds the product once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def close(actual, expected):
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def layer(n, k, dtype=torch.float32):
    return (torch.randn(n, k) / k**0.5).to(dtype)


@DTYPES
def test_a_norm_divided_out_after_the_product_is_the_norm_before_it(dtype):
    residual, gamma, weight = torch.randn(5, 96) * 3, torch.rand(96) + 0.5, layer(40, 96)
    expected = rms_norm_reference(residual, gamma, EPS) @ weight.t()
    squares = residual.square().view(5, 3, 32).sum(2)
    x = (residual * gamma).to(dtype)
    for form in (linear_fused_reference, linear_fused_vendor):
        output = form(x, weight.to(dtype), Fusion(norm=InputNorm(squares, EPS)))
        close(output.y, expected.to(dtype))


@DTYPES
def test_silu_mul_is_the_activation_of_gate_and_up_stacked(dtype):
    x, gate, up = torch.randn(3, 64).to(dtype), layer(40, 64, dtype), layer(40, 64, dtype)
    gate_up = x.float() @ torch.cat((gate, up)).float().t()
    expected = silu_mul_reference(gate_up).to(dtype)
    weight = interleave_gate_up(gate, up)
    close(linear_fused_reference(x, weight, Fusion(silu_mul=True)).y, expected)
    close(linear_fused_vendor(x, weight, Fusion(silu_mul=True)).y, expected)


def test_interleaving_alternates_rows():
    gate, up = torch.arange(3.0).view(3, 1), torch.arange(10.0, 13.0).view(3, 1)
    assert interleave_gate_up(gate, up).flatten().tolist() == [0, 10, 1, 11, 2, 12]


@DTYPES
def test_an_added_residual_and_what_the_next_layer_needs(dtype):
    x, weight = torch.randn(3, 64).to(dtype), layer(40, 64, dtype)
    residual, gamma = torch.randn(3, 40).to(dtype), torch.randn(40).to(dtype)
    expected = (x.float() @ weight.float().t() + residual.float()).to(dtype)
    for form in (linear_fused_reference, linear_fused_vendor):
        output = form(x, weight, Fusion(residual=residual, gamma=gamma))
        close(output.y, expected)
        assert torch.equal(output.scaled, (output.y.float() * gamma.float()).to(dtype))
        squares = output.y.double().square().sum(1)
        torch.testing.assert_close(output.squares.sum(1).double(), squares, rtol=1e-5, atol=0)


@DTYPES
def test_bias_comes_after_the_norm(dtype):
    x, weight, bias = torch.randn(2, 32).to(dtype), layer(8, 32, dtype), torch.randn(8).to(dtype)
    fusion = Fusion(bias=bias, norm=InputNorm(torch.full((2, 1), 128.0), 0.0))  # an rms of 2
    expected = (x.float() @ weight.float().t() / 2 + bias.float()).to(dtype)
    close(linear_fused_reference(x, weight, fusion).y, expected)
    close(linear_fused_vendor(x, weight, fusion).y, expected)


def test_no_rows():
    for form in (linear_fused_reference, linear_fused_vendor):
        assert form(torch.empty(0, 8), layer(6, 8)).y.shape == (0, 6)


GOOD = Fusion(residual=torch.zeros(2, 6), gamma=torch.zeros(6))


@pytest.mark.parametrize(
    ("name", "x", "fusion"),
    [
        ("x", torch.zeros(2, 4), GOOD),
        ("x", torch.zeros(8, 2).t(), GOOD),
        ("residual", torch.zeros(2, 8), replace(GOOD, residual=torch.zeros(3, 6))),
        ("residual", torch.zeros(2, 8), replace(GOOD, residual=torch.zeros(6, 2).t())),
        ("gamma", torch.zeros(2, 8), replace(GOOD, gamma=None)),
        ("gamma", torch.zeros(2, 8), replace(GOOD, gamma=torch.zeros(8))),
        ("silu_mul", torch.zeros(2, 8), replace(GOOD, silu_mul=True)),
        ("bias", torch.zeros(2, 8), Fusion(bias=torch.zeros(8))),
        ("squares", torch.zeros(2, 8), Fusion(norm=InputNorm(torch.zeros(3, 1), EPS))),
    ],
)
def test_what_does_not_fit_is_named(name, x, fusion):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        linear_fused_reference(x, torch.zeros(6, 8), fusion)


def test_halves_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"^up: expected"):
        interleave_gate_up(torch.zeros(3, 4), torch.zeros(2, 4))
