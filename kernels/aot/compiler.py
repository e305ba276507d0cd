"""Compile a Triton kernel for a GPU that is not here, and read what the compiler made of it.

Triton's wheel carries its compilers for NVIDIA and AMD, so a machine without a driver can tell
whether a kernel compiles, how many registers it takes, whether it spills them to memory, and how
much shared memory it needs. `python -m millrace.kernels.aot` prints the table of docs/kernels.md.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ArgumentType = str | tuple[str, ...]
"""Triton's name of a type ("*bf16", "i32"), or those of the parts of a tuple."""
ALIGNED = [["tt.divisibility", 16]]
"""What Triton knows of a pointer that PyTorch allocated, or of an integer that 16 divides."""


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU family, and the bytes of shared memory that one program may have there."""

    name: str
    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),  # A100
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),  # H100, H200
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),  # B200
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
    )
}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel with one signature that it is launched with.

    `types` maps arguments to their types; a tuple may be a named one. Arguments in `constants` are
    constexpr, or were specialised to that value (an integer 1, a None). `aligned` names integers
    that 16 divides at every launch; pointers always are aligned.
    """

    name: str  # as in docs/kernels.md
    kernel: Any  # the triton.JITFunction
    types: Mapping[str, ArgumentType]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What one program of the kernel costs on a target."""

    registers: int  # per thread: vector registers on AMD
    spills: int  # bytes on NVIDIA, vector registers on AMD
    shared: int  # bytes
    assembly: str  # PTX, or AMD's


def compile_spec(spec: KernelSpec, target: Target) -> CompiledKernel:
    """Compile; raises Triton's own errors, and ValueError if an argument has no type."""
    names = spec.kernel.arg_names
    missing = [name for name in names if name not in spec.types and name not in spec.constants]
    if missing:
        raise ValueError(f"{spec.name}: no type for {', '.join(missing)}")
    types = {n: "constexpr" if n in spec.constants else spec.types[n] for n in names}
    source = ASTSource(
        spec.kernel,
        types,
        constexprs={(names.index(n),): value for n, value in spec.constants.items() if n in names},
        attrs=_attributes(spec, types),
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=target.gpu, options=options)
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers: no memory is touched for them.
        registers, spills = _number(text, r"\.vgpr_count"), _number(text, r"\.vgpr_spill_count")
        return CompiledKernel(registers, spills, shared, text)
    report = _ptxas(compiled.asm["ptx"])
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return CompiledKernel(registers, spills, shared, compiled.asm["ptx"])


def _attributes(
    spec: KernelSpec, types: Mapping[str, ArgumentType]
) -> dict[tuple[int, ...], list[list[Any]]]:
    """What is known of each argument, spelt as a launch spells it: it is part of the cache's key.

    So a launch with this signature on such a GPU finds what was compiled here. A key is the
    argument's place, and of a tuple's part also its place in there.
    """
    found: dict[tuple[int, ...], list[list[Any]]] = {}
    for i_argument, param in enumerate(spec.kernel.params):
        kind = types[param.name]
        parts = (
            {(i_argument,): kind}
            if isinstance(kind, str)
            else {(i_argument, i_part): part for i_part, part in enumerate(kind)}
        )
        for place, part in parts.items():
            if part.startswith("*") or param.name in spec.aligned:
                found[place] = ALIGNED
            elif part == "constexpr" or (part.startswith("i") and not param.do_not_specialize):
                found[place] = []
    return found


def _number(text: str, name: str) -> int:
    return int(re.findall(rf"{name}: +(\d+)", text)[0])


def _ptxas(ptx: str) -> str:
    """The assembler's report on PTX: Triton keeps neither registers nor spills without a driver."""
    arch = re.findall(r"\.target (\w+)", ptx)[0]
    tool = "ptxas-blackwell" if arch.startswith("sm_10") else "ptxas"
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command: list[str | Path] = [path, "-v", f"--gpu-name={arch}", source, "-o", binary]
        report: str = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return report
