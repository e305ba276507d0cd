"""RMSNorm in Triton against its definition; what it allocates starts as NaN, between guards."""

import pytest
import torch

from millrace.kernels.norm import add_rms_norm_reference, rms_norm_reference
from millrace.kernels.norm_triton import MAX_HIDDEN, add_rms_norm, norm_config, rms_norm

# A sum in another order can move each of the two roundings by a step of the dtype. bf16 here: the
# interpreter truncates where the reference rounds, which is one more.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
TOLERANCE = {
    torch.float32: 4 * EPS[torch.float32],
    torch.float16: 2 * EPS[torch.float16],
    torch.bfloat16: 3 * EPS[torch.bfloat16],
}
CPU = torch.device("cpu")


def close(actual, expected):
    dtype = expected.dtype
    assert actual.dtype == dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=EPS[dtype] * 1e-3)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 48), (33, 64), (65, 80), (3, 576), (5, 1024), (2, 1025), (3, 4096), (2, 5120), (1, 16384)],
    ids=str,
)
def test_both_forms_agree_with_the_definition(shape, dtype):
    x, residual = torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    before = x.clone(), residual.clone()
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    actual, expected = (
        form(x, residual, weight, 1e-5) for form in (add_rms_norm, add_rms_norm_reference)
    )
    close(actual[1], expected[1])
    # From the sum that it made: the interpreter's bf16 sum may be a step below the reference's.
    close(actual[0], rms_norm_reference(actual[1], weight, 1e-5))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [(64, torch.float32), (64, torch.bfloat16), (576, torch.float16), (1600, torch.float32)],
    ids=str,
)
def test_a_row_has_the_same_bits_whatever_the_number_of_tokens_and_its_place(hidden, dtype):
    x, residual = torch.randn(257, hidden).to(dtype), torch.randn(257, hidden).to(dtype)
    weight = torch.randn(hidden).to(dtype)
    together = add_rms_norm(x, residual, weight, 1e-5)
    for start, stop in ((0, 1), (256, 257), (31, 34), (15, 32)):
        rows = slice(start, stop)
        part = add_rms_norm(x[rows], residual[rows], weight, 1e-5)
        for alone, among in zip(part, together, strict=True):
            assert torch.equal(alone, among[rows])


@pytest.mark.parametrize("hidden", [48, 64, 576, 1024, 1025, 4096, 5120, MAX_HIDDEN])
def test_a_program_is_fixed_by_the_width_and_fits_its_registers(hidden):
    config = norm_config(hidden, CPU)
    elements = config.constants["ROWS"] * max(hidden, 1 << (hidden - 1).bit_length())
    assert (config.constants["ROWS"] > 1) == (hidden <= 1024)
    assert elements <= 1024 * config.num_warps  # 32 a thread
    assert config.num_warps & (config.num_warps - 1) == 0


@pytest.mark.usefixtures("guarded_outputs")
def test_rows_lie_at_any_stride_and_columns_between_them_are_not_read():
    weight = torch.randn(48)
    wide = torch.full((6, 5, 100), float("nan"))
    wide[:, :, 7:55] = torch.randn(6, 5, 48)
    x = wide[:, 1:4, 7:55]  # [6, 3, 48] that folds into no matrix of rows
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    x, residual = wide[0, :, 7:55], wide[::2, 0, 7:55].repeat(2, 1)[:5]
    close(
        add_rms_norm(x, residual, weight, 1e-5)[0], rms_norm_reference(x + residual, weight, 1e-5)
    )


def test_no_rows_are_no_work():
    empty = torch.empty(0, 48)
    assert rms_norm(empty, torch.ones(48), 1e-5).shape == (0, 48)
    assert [y.shape for y in add_rms_norm(empty, empty, torch.ones(48), 1e-5)] == [(0, 48)] * 2


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 64), torch.ones(32), r"weight: expected \[64\]"),
        (torch.ones(2, 64), torch.ones(64).half(), "weight: expected"),
        (torch.ones(2, 128)[:, ::2], torch.ones(64), "x: expected a last stride of 1, got 2"),
        (torch.ones(1, 16385), torch.ones(16385), "x: expected at most 16384"),
    ],
    ids=["weight shape", "weight dtype", "stride", "width"],
)
def test_an_argument_that_does_not_fit_is_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5)


def test_a_residual_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match="residual: expected"):
        add_rms_norm(torch.randn(4, 8), torch.randn(1, 8), torch.ones(8), 1e-5)
