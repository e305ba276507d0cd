"""The attention kernels compile for GPUs that are not here, and keep their registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from millrace.kernels import attention_triton as kernels  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(kernels._decode_kernel, triton.JITFunction), reason="TRITON_INTERPRET is on"
)

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_LIMIT = {"sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may have
DECODE = {
    "p_q": "*bf16",
    "p_k": "*bf16",
    "p_v": "*bf16",
    "p_block_table": "*i32",
    "p_slots": "*i64",
    "p_context_lens": "*i32",
    "p_out": "*bf16",
    "p_partial": "*fp32",
    "p_max": "*fp32",
    "p_sum": "*fp32",
    "scale_log2": "fp32",
    "softcap_log2": "fp32",
    "stride_q_token": "i32",
    "stride_q_head": "i32",
    "stride_table": "i32",
}
MERGE = {
    "p_partial": "*fp32",
    "p_max": "*fp32",
    "p_sum": "*fp32",
    "p_context_lens": "*i32",
    "p_out": "*bf16",
    "num_splits": "i32",
}


def decode_constants(head_dim, group=4, window=0, softcap=False, block_m=16, tile=kernels.TILE):
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": 16,
        "SPLIT": kernels.SPLIT,
        "TILE": tile,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "UPCAST": False,
    }


def compile_kernel(kernel, signature, constants, target, num_warps=kernels.NUM_WARPS):
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    pointers = [i for i, name in enumerate(names) if types[name].startswith("*")]
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": num_warps, "num_stages": kernels.NUM_STAGES}
    return triton.compile(source, target=target, options=options)


def spilled(compiled, tmp_path):
    """Registers or bytes that the compiler moved to memory; 0 is what we want."""
    if "amdgcn" in compiled.asm:
        return sum(
            int(n) for n in re.findall(r"\.[vs]gpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
        )
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    arch = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", f"--gpu-name={arch}", ptx, "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "spill stores" in report
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "group", "window", "softcap"),
    [(64, 3, 0, False), (128, 4, 0, False), (80, 1, 0, False), (256, 2, 4096, True)],
    ids=lambda value: str(value),
)
def test_decode_kernel_compiles_without_spills(head_dim, group, window, softcap, target, tmp_path):
    constants = decode_constants(head_dim, group, window, softcap)
    compiled = compile_kernel(kernels._decode_kernel, DECODE, constants, TARGETS[target])
    assert spilled(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]


@pytest.mark.parametrize("target", TARGETS)
def test_merge_kernel_compiles_without_spills(target, tmp_path):
    constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "SPLIT": kernels.SPLIT, "WINDOW": 0}
    compiled = compile_kernel(kernels._merge_kernel, MERGE, constants, TARGETS[target])
    assert spilled(compiled, tmp_path) == 0


def test_the_count_notices_a_tile_too_large_for_its_registers(tmp_path):
    constants = decode_constants(64, block_m=64)
    compiled = compile_kernel(
        kernels._decode_kernel, DECODE, constants, TARGETS["sm_90"], num_warps=1
    )
    assert spilled(compiled, tmp_path) > 0
