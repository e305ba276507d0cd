"""Which implementation of each operation runs: a table, looked up once when the engine starts.

    auto        triton on CUDA, torch on a CPU
    torch       plain PyTorch; on a CPU the forms tuned for it
    triton      Triton kernels; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)
    xformers    as triton, with attention by xformers; on CUDA only
    reference   the definitions: slow, for comparison

Deterministic steps, where a row has the same bits in any batch: triton by its own matrix products
alone, and torch on a CPU by `row_invariant_cpu.py`. The others choose by the number of rows.

Everything above `kernels` calls through an `Operations` and never asks which device it is on.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.kernels import (
    activation,
    attention,
    attention_cpu,
    kv_append,
    matmul,
    norm,
    row_invariant_cpu,
)
from millrace.kernels.drawn_logprobs import drawn_logprobs_cpu, drawn_logprobs_reference
from millrace.kernels.logprobs import RawLogprobs, raw_logprobs_cpu, raw_logprobs_reference
from millrace.kernels.sampling import SampledTokens, sample_reference
from millrace.kernels.sampling_cpu import sample_cpu

try:
    from millrace.kernels import (
        activation_triton,
        append_attention_triton,
        attention_triton,
        fused_model,
        kv_append_triton,
        logprobs_triton,
        norm_triton,
        sampling_triton,
    )

    HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name != "triton":  # a mistake of ours must not look like a missing package
        raise
    HAS_TRITON = False  # it has no wheel for this platform

BACKENDS = ("auto", "torch", "triton", "xformers", "reference")


@dataclass(frozen=True, slots=True)
class Operations:
    """The operations of one backend; their arguments are those of the functions named here."""

    name: str  # of BACKENDS, but "auto"
    rms_norm: Callable[..., Tensor]  # norm.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]  # norm.add_rms_norm
    silu_mul: Callable[..., Tensor]  # activation.silu_mul
    gelu_tanh_mul: Callable[..., Tensor]  # activation.gelu_tanh_mul
    kv_append: Callable[..., Tensor]  # kv_append.kv_append
    append_attention: Callable[..., Tensor] | None  # append_attention_reference, for decodes alone
    prepare_attention: Callable[..., Any]  # (batch, block_size, window) -> what the next one takes
    paged_attention: Callable[..., Tensor]  # (q, k_cache, v_cache, prepared, *, scale, ...)
    pack_linear: Callable[..., matmul.PackedLinear]  # matmul.pack_linear
    fuse: Callable[..., Any] | None  # fused_model.fuse, where there are fused products
    sample: Callable[..., SampledTokens]  # sampling.sample_reference
    raw_logprobs: Callable[..., RawLogprobs]  # logprobs.raw_logprobs_reference
    drawn_logprobs: Callable[..., RawLogprobs]  # drawn_logprobs.drawn_logprobs_reference

    @property
    def interleaved(self) -> bool:
        """Whether rows of gate and up alternate in one weight, as fused products need them."""
        return self.fuse is not None


REFERENCE = Operations(
    name="reference",
    rms_norm=norm.rms_norm_reference,
    add_rms_norm=norm.add_rms_norm_reference,
    silu_mul=activation.silu_mul_reference,
    gelu_tanh_mul=activation.gelu_tanh_mul_reference,
    kv_append=kv_append.kv_append_reference,
    append_attention=None,
    prepare_attention=attention.prepare_attention,
    paged_attention=attention.paged_attention_reference,
    pack_linear=matmul.pack_linear_reference,
    fuse=None,
    sample=sample_reference,
    raw_logprobs=raw_logprobs_reference,
    drawn_logprobs=drawn_logprobs_reference,
)

TORCH_ON_GPU = replace(
    REFERENCE,
    name="torch",
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    silu_mul=activation.silu_mul,
    gelu_tanh_mul=activation.gelu_tanh_mul,
    kv_append=kv_append.kv_append,
    pack_linear=matmul.pack_linear,
)

TORCH_ON_CPU = replace(
    TORCH_ON_GPU,
    prepare_attention=attention_cpu.prepare_attention_cpu,
    paged_attention=attention_cpu.paged_attention_cpu,
    sample=sample_cpu,
    raw_logprobs=raw_logprobs_cpu,
    drawn_logprobs=drawn_logprobs_cpu,
)

ROW_INVARIANT_ON_CPU = replace(
    TORCH_ON_CPU,
    rms_norm=row_invariant_cpu.rms_norm,
    add_rms_norm=row_invariant_cpu.add_rms_norm,
    silu_mul=row_invariant_cpu.silu_mul,
    kv_append=row_invariant_cpu.append,
    prepare_attention=row_invariant_cpu.prepare_queries,
    sample=row_invariant_cpu.sample,
)


def operations(
    device: torch.device, attention_backend: str = "auto", deterministic: bool = False
) -> Operations:
    """The table for `device`; ValueError where the backend is unknown or cannot run there.

    Deterministic: a row's bits depend on nothing but the row; ValueError where that cannot be had.
    """
    if attention_backend not in BACKENDS:
        raise ValueError(
            f"attention_backend: expected one of {', '.join(BACKENDS)}, got {attention_backend!r}"
        )
    on_gpu = device.type == "cuda"
    if attention_backend == "auto":
        attention_backend = "triton" if on_gpu else "torch"
    if deterministic and attention_backend == "torch" and not on_gpu:
        return replace(ROW_INVARIANT_ON_CPU, pack_linear=row_invariant_cpu.RowInvariantPacking())
    if deterministic and attention_backend != "triton":
        raise ValueError(
            f"deterministic: attention_backend {attention_backend} on {device.type} gives a row "
            "other bits in another batch; expected triton on CUDA, or torch on a CPU"
        )
    if attention_backend == "reference":
        return REFERENCE
    if attention_backend == "torch":
        return TORCH_ON_GPU if on_gpu else TORCH_ON_CPU
    if attention_backend == "xformers":
        return _xformers_operations(on_gpu)
    return _triton_operations(on_gpu, deterministic)


def _triton_operations(on_gpu: bool, deterministic: bool = False) -> Operations:
    if not HAS_TRITON:
        raise ValueError("attention_backend: triton is not installed; expected torch or reference")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "attention_backend: triton on a CPU runs only in the interpreter (TRITON_INTERPRET=1); "
            "expected torch or reference"
        )
    return replace(
        TORCH_ON_GPU,
        name="triton",
        rms_norm=norm_triton.rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        silu_mul=activation_triton.silu_mul,
        gelu_tanh_mul=activation_triton.gelu_tanh_mul,
        kv_append=kv_append_triton.kv_append,
        append_attention=append_attention_triton.append_attention,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention_triton.paged_attention,
        pack_linear=matmul.pack_linear_reference,
        fuse=partial(fused_model.fuse, deterministic=deterministic),
        sample=sampling_triton.sample_triton,
        raw_logprobs=logprobs_triton.raw_logprobs_triton,
        drawn_logprobs=logprobs_triton.drawn_logprobs_triton,
    )


def _xformers_operations(on_gpu: bool) -> Operations:
    if not on_gpu:
        raise ValueError("attention_backend: xformers runs on CUDA only; expected torch or triton")
    try:  # here, for it loads much that nobody else needs
        from millrace.kernels import attention_xformers
    except ImportError as error:
        raise ValueError(
            "attention_backend: xformers is not installed (pip install millrace[xformers]);"
            " expected triton or torch"
        ) from error
    return replace(
        _triton_operations(on_gpu),
        name="xformers",
        append_attention=None,
        prepare_attention=attention_xformers.prepare_attention_xformers,
        paged_attention=attention_xformers.paged_attention_xformers,
    )
