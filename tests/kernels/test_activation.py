"""The gated activations against their formulas in float64."""

import math

import pytest
import torch

from millrace.kernels.activation import (
    gelu_tanh_mul,
    gelu_tanh_mul_reference,
    silu_mul,
    silu_mul_reference,
)

# Two roundings to the dtype (activation, product) against none.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def silu(a):
    return a / (1 + torch.exp(-a))


def gelu_tanh(a):
    return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("forms", "activation"),
    [
        ((silu_mul, silu_mul_reference), silu),
        ((gelu_tanh_mul, gelu_tanh_mul_reference), gelu_tanh),
    ],
    ids=["silu", "gelu_tanh"],
)
def test_first_half_gates_the_second(forms, activation, dtype):
    gate_up = (torch.randn(17, 2 * 48) * 3).to(dtype)
    gate, up = gate_up[:, :48].double(), gate_up[:, 48:].double()
    for form in forms:
        y = form(gate_up)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), activation(gate) * up, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("form", [silu_mul, gelu_tanh_mul])
def test_input_is_left_alone_and_may_be_empty(form):
    gate_up = torch.randn(3, 8)
    before = gate_up.clone()
    form(gate_up)
    assert torch.equal(gate_up, before)
    assert form(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("bad", [torch.randn(3, 7), torch.randn(8), torch.ones(2, 4).long()])
def test_an_odd_width_a_vector_and_integers_are_refused(bad):
    with pytest.raises(ValueError, match=r"gate_up: expected \[T, 2F\]"):
        silu_mul(bad)
