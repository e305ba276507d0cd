"""Every kernel with the signatures it is launched with, compiled ahead of time for its targets."""

from millrace.kernels.aot import (
    activation,
    append_attention,
    attention,
    kv_append,
    matmul,
    norm,
    sampling,
)
from millrace.kernels.aot.compiler import TARGETS, CompiledKernel, KernelSpec, Target, compile_spec

__all__ = ["SPECS", "TARGETS", "CompiledKernel", "KernelSpec", "Target", "compile_spec"]

SPECS: tuple[KernelSpec, ...] = (
    *attention.SPECS,
    *kv_append.SPECS,
    *append_attention.SPECS,
    *norm.SPECS,
    *activation.SPECS,
    *matmul.SPECS,
    *sampling.SPECS,
)
