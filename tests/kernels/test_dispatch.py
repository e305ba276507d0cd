"""The table of implementations, and a step of attention through each entry that runs here."""

import sys
from dataclasses import fields

import pytest
import torch

from millrace.kernels import dispatch
from millrace.kernels.dispatch import operations

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "backend", "name"),
    [
        (CPU, "auto", "torch"),
        (CPU, "torch", "torch"),
        (CPU, "reference", "reference"),
        (CUDA, "auto", "triton"),
        (CUDA, "triton", "triton"),
        (CUDA, "torch", "torch"),
        (CUDA, "reference", "reference"),
    ],
    ids=str,
)
def test_backend_by_device_and_name(device, backend, name):
    chosen = operations(device, backend)
    assert chosen.name == name
    optional = {"fuse", "append_attention"} if name != "triton" else set()
    required = [f.name for f in fields(chosen) if f.name not in {"name", *optional}]
    assert all(callable(getattr(chosen, name)) for name in required)


def test_an_unknown_backend_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="auto, torch, triton, xformers, reference, got 'flash'"):
        operations(CPU, "flash")


def test_triton_on_a_cpu_runs_in_the_interpreter_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        operations(CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert operations(CPU, "triton").name == "triton"


def test_triton_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        operations(CUDA, "auto")


def test_xformers_runs_on_cuda_only():
    with pytest.raises(ValueError, match="xformers runs on CUDA only"):
        operations(CPU, "xformers")


def test_xformers_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "millrace.kernels.attention_xformers", raising=False)
    with pytest.raises(ValueError, match="xformers is not installed"):
        operations(CUDA, "xformers")


def test_every_backend_has_the_same_calling_form(attention_case):
    case = attention_case([33, 40, 20], [1, 1, 20])
    results = []
    for backend in ("torch", "reference"):
        ops = operations(CPU, backend)
        prepared = ops.prepare_attention(case.batch, case.block_size, 24)
        results.append(
            ops.paged_attention(case.q, case.k_cache, case.v_cache, prepared, scale=0.125)
        )
    torch.testing.assert_close(results[0], results[1], rtol=3e-6, atol=3e-6)
