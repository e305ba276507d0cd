"""The bytes of e4m3 numbers against PyTorch's cast: every number, every tie, all beyond."""

import pytest
import torch
import triton
import triton.language as tl

from millrace.kernels.fp8_triton import encode_e4m3
from millrace.kernels.kv_append import FP8, to_fp8


@triton.jit
def encode_kernel(p_x, p_out, n, TILE: tl.constexpr):
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(p_out + o, encode_e4m3(tl.load(p_x + o, mask=o < n, other=0.0)), mask=o < n)


def encode(x):
    out = torch.full(x.shape, 0xFF, dtype=torch.uint8)
    encode_kernel[(triton.cdiv(len(x), 1024),)](x, out, len(x), TILE=1024)
    return out


def expected(x):
    return to_fp8(x[:, None], torch.ones(1))[:, 0].view(torch.uint8)


def test_every_number_and_every_value_around_the_ties():
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat(
        [
            step
            for values in (numbers, ties)
            for step in (
                values,
                torch.nextafter(values, torch.tensor(torch.inf)),
                torch.nextafter(values, torch.tensor(-torch.inf)),
            )
        ]
    )
    x = torch.cat((x, -x))
    assert torch.equal(encode(x), expected(x))


@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 200.0])
def test_random_values(scale):
    x = torch.randn(5000) * scale
    assert torch.equal(encode(x), expected(x))


def test_what_is_too_large_saturates_and_nan_stays_nan():
    x = torch.tensor([448.0, 464.0, 1e30, torch.inf, -torch.inf, torch.nan, -0.0, 1e-40])
    actual = encode(x)
    assert actual.tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80, 0x00]
    assert actual.view(FP8)[5].isnan()
