"""Packed linear layers against float64, natively and with the fallbacks of lesser CPUs."""

import pytest
import torch

from millrace.kernels import matmul
from millrace.kernels.matmul import pack_linear, pack_linear_reference

# Relative to outputs of size 1: float32 sums in another order; 16-bit rounds the result once.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def exact(x, weight, bias):
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 63, 65])
def test_product_is_right_in_the_dtype_of_the_weight(num_tokens, dtype, with_bias):
    weight = (torch.randn(96, 160) / 160**0.5).to(dtype)
    bias = torch.randn(96).to(dtype) if with_bias else None
    x = torch.randn(num_tokens, 160).to(dtype)
    tolerance = TOLERANCE[dtype]
    for pack in (pack_linear, pack_linear_reference):
        linear = pack(weight, bias)
        y = linear(x)
        assert y.shape == (num_tokens, 96) and y.dtype == dtype
        expected = exact(x, weight, bias)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_dtype_that_the_cpu_lacks_is_computed_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(matmul, "_is_native", lambda asked: asked == torch.float32)
    weight, x = torch.randn(96, 160).to(dtype), torch.randn(5, 160).to(dtype)
    linear = pack_linear(weight)
    assert linear.weight.dtype == torch.float32 and linear.dtype == dtype
    expected = exact(x, weight, None).to(dtype)
    torch.testing.assert_close(linear(x), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_without_onednn_the_weight_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    weight = torch.randn(8, 16)
    linear = pack_linear(weight)
    assert not linear.prepacked and linear.weight is weight
    assert linear(torch.randn(2, 16)).shape == (2, 8)


def test_the_packed_copy_outlives_changes_to_the_weight():
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    linear = pack_linear(weight)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)


def test_a_strided_input_is_read_as_it_lies():
    linear, wide = pack_linear(torch.randn(32, 64)), torch.randn(5, 100)
    torch.testing.assert_close(linear(wide[:, 10:74]), linear(wide[:, 10:74].contiguous()))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pack_linear(torch.randn(4)), "weight"),
        (lambda: pack_linear(torch.ones(4, 4).int()), "weight"),
        (lambda: pack_linear(torch.randn(4, 8), torch.randn(8)), "bias"),
        (lambda: pack_linear(torch.randn(4, 8), torch.randn(4).half()), "bias"),
        (lambda: pack_linear(torch.randn(4, 8))(torch.randn(2, 4)), "x"),
        (lambda: pack_linear(torch.randn(4, 8))(torch.randn(2, 8).half()), "x"),
        (lambda: pack_linear(torch.randn(4, 8))(torch.randn(8)), "x"),
    ],
    ids=["vector", "integers", "bias size", "bias dtype", "width", "dtype", "rank"],
)
def test_what_does_not_fit_is_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()
