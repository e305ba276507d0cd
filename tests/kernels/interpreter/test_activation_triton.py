"""The gated activations in Triton against their definitions and against float64."""

import math

import pytest
import torch

from millrace.kernels.activation import gelu_tanh_mul_reference, silu_mul_reference
from millrace.kernels.activation_triton import MAX_TILE, gelu_tanh_mul, silu_mul
from millrace.kernels.matmul_fused import interleave_gate_up

# exp of a large negative gate overflows on its way to a sigmoid of zero, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

# Two roundings to the dtype, of half a step each; in bf16 the interpreter truncates: a step each.
DTYPE_STEPS = {torch.float32: 4, torch.float16: 1.5, torch.bfloat16: 2.5}
LOGIT_STEPS = 3  # of float32: what the logit is off by, which exp turns into a relative error
FORMS = [(silu_mul, silu_mul_reference), (gelu_tanh_mul, gelu_tanh_mul_reference)]


def exact(form, gate_up):
    """(y, how far from it a kernel may be), by the formula in float64."""
    dtype = gate_up.dtype
    a, up = gate_up.double().chunk(2, dim=1)
    logit = a if form is silu_mul else 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    y = a / (1 + torch.exp(-logit)) * up
    relative = DTYPE_STEPS[dtype] * torch.finfo(dtype).eps + LOGIT_STEPS * 2.0**-23 * logit.abs()
    underflow = (a * up).abs() * 2.0**-126 + 4 * torch.finfo(dtype).smallest_normal
    return y, relative * y.abs() + underflow


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("dtype", DTYPE_STEPS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 63), (2, 1000), (3, MAX_TILE), (2, MAX_TILE + 1), (1, 5000)], ids=str
)
@pytest.mark.parametrize(("form", "reference"), FORMS, ids=["silu", "gelu_tanh"])
def test_both_activations_agree_with_the_definition_and_the_formula(form, reference, shape, dtype):
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 3).to(dtype)
    before = gate_up.clone()
    actual, (y, allowed) = form(gate_up), exact(form, gate_up)
    assert actual.dtype == dtype and actual.shape == shape and torch.equal(gate_up, before)
    assert ((actual.double() - y).abs() <= allowed).all()
    # 1 + tanh u of the definition is right to 2^-24, however small the result.
    gate, up = gate_up.double().abs().chunk(2, dim=1)
    error = (actual.double() - reference(gate_up).double()).abs()
    assert (error <= 2 * allowed + 2.0**-23 * gate * up).all()


@pytest.mark.parametrize("dtype", DTYPE_STEPS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, MAX_TILE + 1)], ids=str)
def test_interleaved_columns_give_the_bits_of_halves(shape, dtype):
    gate, up = torch.randn(2, *shape).to(dtype)
    interleaved = interleave_gate_up(gate.t(), up.t()).t().contiguous()
    assert torch.equal(interleaved[:, 0::2], gate) and torch.equal(interleaved[:, 1::2], up)
    expected = silu_mul(torch.cat((gate, up), dim=1))
    assert torch.equal(silu_mul(interleaved, interleaved=True), expected)
    torch.testing.assert_close(silu_mul_reference(interleaved, interleaved=True), expected)


@pytest.mark.parametrize("form", [silu_mul, gelu_tanh_mul])
def test_small_gates_keep_their_bits_and_large_ones_saturate(form):
    gate = torch.tensor([1e-30, -1e-6, 1e-3, 90.0, 3e4, -3e4, -90.0, 0.0])
    actual = form(torch.cat((gate, torch.ones(8)))[None])[0]
    assert torch.equal(actual[3:5], gate[3:5])
    assert (actual[5:].abs() <= 90 * math.exp(-90)).all()
    y, _ = exact(form, torch.cat((gate, torch.ones(8)))[None])
    torch.testing.assert_close(actual[:3].double(), y[0, :3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [silu_mul, gelu_tanh_mul])
def test_a_row_has_the_same_bits_whatever_the_number_of_tokens_and_its_place(form):
    gate_up = torch.randn(33, 2 * 70)
    together = form(gate_up)
    for start, stop in ((0, 1), (32, 33), (15, 18)):
        assert torch.equal(form(gate_up[start:stop]), together[start:stop])


@pytest.mark.usefixtures("guarded_outputs")
def test_rows_lie_at_any_stride_and_columns_between_them_are_not_read():
    wide = torch.full((5, 60), float("nan"))
    wide[:, 3:51] = torch.randn(5, 48)
    for rows in (wide[:, 3:51], wide[::2, 3:51]):
        torch.testing.assert_close(silu_mul(rows), silu_mul_reference(rows))


def test_no_rows_are_no_work():
    assert silu_mul(torch.empty(0, 48)).shape == (0, 24)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(3, 7), r"gate_up: expected \[T, 2F\]"),
        (torch.randn(8), r"gate_up: expected \[T, 2F\]"),
        (torch.ones(2, 4).long(), r"gate_up: expected \[T, 2F\]"),
        (torch.ones(2, 8)[:, ::2], "gate_up: expected a last stride of 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        gelu_tanh_mul(bad)
