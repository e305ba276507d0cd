"""Every kernel with the signatures it is launched with, compiled ahead of time for its targets."""

from millrace.kernels.aot import attention, matmul, sampling
from millrace.kernels.aot.compiler import TARGETS, CompiledKernel, KernelSpec, Target, compile_spec

__all__ = ["SPECS", "TARGETS", "CompiledKernel", "KernelSpec", "Target", "compile_spec"]

SPECS: tuple[KernelSpec, ...] = (*attention.SPECS, *matmul.SPECS, *sampling.SPECS)
