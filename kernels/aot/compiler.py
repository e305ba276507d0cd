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

ALIGNED = [["tt.divisibility", 16]]
"""What Triton knows of a pointer that PyTorch allocated, or of an integer that 16 divides."""
LISTS_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
"""Whether a launch says of constants, too, that nothing is known: since Triton 3.7 it does."""


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

    `types` maps arguments to Triton's names of types ("*bf16", "i32"); of a named tuple, to one of
    its members' types and, where a member is a constant, its value. Arguments in `constants` are
    constexpr, or were specialised to that value (an integer 1, a None). `options` are the launch's
    own, by the constants and functions that it takes them from. `aligned` names integers that 16
    divides at every launch; pointers always are aligned.
    """

    name: str  # as in docs/kernels.md
    kernel: Any  # the triton.JITFunction
    types: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps and others
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
    types = {n: "constexpr" if n in spec.constants else _type(spec.types[n]) for n in names}
    source = ASTSource(spec.kernel, types, _constants(spec), _attributes(spec, types))
    compiled = triton.compile(source, target=target.gpu, options=dict(spec.options))
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


def _type(kind: Any) -> Any:
    """As a launch spells it: a constant in a tuple has a type as well."""
    if isinstance(kind, str):
        return kind
    return type(kind)(*(k if isinstance(k, str) else "constexpr" for k in kind))


def _constants(spec: KernelSpec) -> dict[tuple[int, ...], Any]:
    """The place of each constant, in the arguments or in one that is a tuple, and its value."""
    found: dict[tuple[int, ...], Any] = {}
    for i_argument, name in enumerate(spec.kernel.arg_names):
        if name in spec.constants:
            found[(i_argument,)] = spec.constants[name]
        elif isinstance(spec.types[name], tuple):
            members = enumerate(spec.types[name])
            found |= {(i_argument, i): k for i, k in members if not isinstance(k, str)}
    return found


def _attributes(spec: KernelSpec, types: Mapping[str, Any]) -> dict[tuple[int, ...], Any]:
    """What is known of each argument, spelt as a launch spells it: it is part of the cache's key.

    So a launch with this signature on such a GPU finds what was compiled here. A key is the
    argument's place, and of a tuple's part also its place in there.
    """
    found: dict[tuple[int, ...], Any] = {}
    for i_argument, param in enumerate(spec.kernel.params):
        kind = types[param.name]
        if isinstance(kind, tuple):
            known = {"*": ALIGNED, "i": []}  # of pointers and of integers
            places = {(i_argument, i): member[0] for i, member in enumerate(kind)}
            found |= {place: known[first] for place, first in places.items() if first in known}
        elif kind.startswith("*") or param.name in spec.aligned:
            found[(i_argument,)] = ALIGNED
        elif kind == "constexpr":
            found |= {(i_argument,): []} if LISTS_CONSTANTS else {}
        elif kind.startswith("i") and not param.do_not_specialize:
            found[(i_argument,)] = []
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
