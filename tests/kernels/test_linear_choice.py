"""Which form serves which rows: the vendor's where nothing was measured, Triton's if told to."""

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels import linear_choice
from millrace.kernels.configs import LaunchConfig
from millrace.kernels.linear_choice import LinearChoice, choose_linear, fused_linear
from millrace.kernels.matmul_fused import linear_fused_vendor
from millrace.kernels.matmul_triton import Workspace

WEIGHT = torch.randn(64, 32)


def measured(max_rows):
    return lambda weight: LaunchConfig(4, 2, {"MAX_ROWS": max_rows})


def test_unmeasured_is_the_vendor_s():
    assert choose_linear(WEIGHT) == LinearChoice(0, 0, persistent=False)
    layer, x = fused_linear(WEIGHT, Workspace.for_weights([])), torch.randn(3, 32)
    assert torch.equal(layer(x).y, linear_fused_vendor(x, WEIGHT).y)


def test_deterministic_is_triton_s_for_all_rows():
    assert choose_linear(WEIGHT, deterministic=True) == LinearChoice(0, 64, persistent=True)


@pytest.mark.parametrize(("gemv", "decode"), [(2, 32), (0, 16), (4, 0)])
def test_a_measured_row_says_up_to_how_many_rows(gemv, decode, monkeypatch):
    monkeypatch.setattr(linear_choice, "gemv_config", measured(gemv))
    monkeypatch.setattr(linear_choice, "decode_config", measured(decode))
    assert choose_linear(WEIGHT) == LinearChoice(gemv, decode, persistent=False)


def test_a_row_cannot_promise_more_than_the_kernel_takes(monkeypatch):
    monkeypatch.setattr(linear_choice, "gemv_config", measured(9))
    monkeypatch.setattr(linear_choice, "decode_config", measured(999))
    assert choose_linear(WEIGHT) == LinearChoice(4, 64, persistent=False)


@pytest.mark.parametrize(
    ("rows", "form"),
    [(1, "gemv"), (2, "gemv"), (3, "decode"), (8, "decode"), (9, "fused_vendor")],
)
def test_rows_choose_the_form(rows, form, monkeypatch):
    called = []
    for name in ("gemv", "decode", "persistent", "fused_vendor"):
        monkeypatch.setattr(linear_choice, f"linear_{name}", lambda *of, n=name: called.append(n))
    monkeypatch.setattr(linear_choice, "gemv_config", measured(2))
    monkeypatch.setattr(linear_choice, "decode_config", measured(8))
    fused_linear(WEIGHT, Workspace.for_weights([]))(torch.randn(rows, 32))
    assert called == [form]
    fused_linear(WEIGHT, Workspace.for_weights([]), deterministic=True)(torch.randn(rows, 32))
    fused_linear(WEIGHT, Workspace.for_weights([]), deterministic=True)(torch.randn(65, 32))
    assert called[1:] == ["decode", "persistent"]
