"""The one error message of every launcher."""

import pytest
import torch

from millrace.kernels.checks import expect, expect_contiguous


def test_a_fitting_tensor_passes_and_none_matches_any_size():
    expect("x", torch.zeros(2, 3), (2, None))
    expect("x", torch.zeros(2, dtype=torch.int64), (2,), torch.int64)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4), torch.float32, r"x: expected \[2, 4\] of float32, got \[2, 3\] of float32"),
        ((None,), torch.float32, r"x: expected \[\*\] of float32, got \[2, 3\] of float32"),
        ((2, 3), (torch.int32, torch.int64), r"of int32 \| int64, got \[2, 3\] of float32"),
    ],
    ids=["size", "rank", "dtype"],
)
def test_the_message_names_what_was_expected_and_what_came(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        expect("x", torch.zeros(2, 3), shape, dtype)


def test_a_transposed_tensor_is_not_contiguous():
    expect_contiguous("x", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x: expected a contiguous tensor, got strides \[1, 3\]"):
        expect_contiguous("x", torch.zeros(2, 3).t())
