"""The sampling kernels compile for GPUs that are not here, and keep their registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from millrace.kernels import logprobs_triton, sampling_filters_triton, sampling_triton  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(sampling_triton.stats_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET is on",
)

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {  # of the arguments that are not *fp32
    "p_logits": "*bf16",
    "p_slots": "*i64",
    "p_positions": "*i64",
    "p_top_k": "*i32",
    "p_seed": "*i64",
    "p_has_bias": "*i1",
    "p_seen": "*i1",
    "p_counts": "*i32",
    "p_has_penalties": "*i1",
    "p_stop_ids": "*i32",
    "p_min_position": "*i64",
    "p_mass": "*i64",
    "p_best_id": "*i32",
    "p_total": "*i64",
    "p_count": "*i32",
    "p_keys": "*i64",
    "p_token_ids": "*i64",
    "p_ok": "*i1",
    "p_above": "*i32",
    "p_ranks": "*i64",
    "p_top_ids": "*i64",
    "stride_logits": "i32",
    "tiles": "i32",
    "vocab": "i32",
    "num_top": "i32",
}
TILES = 64  # a vocabulary of up to 262,144 tokens
FILTERS, LOGPROBS = sampling_filters_triton, logprobs_triton
KERNELS = {  # kernel, warps, constants
    "stats": (sampling_triton.stats_kernel, sampling_triton.STATS_WARPS, {}),
    "bound": (FILTERS.bound_kernel, sampling_triton.bound_warps(TILES), {"TILES": TILES}),
    "gather": (FILTERS.gather_kernel, sampling_triton.GATHER_WARPS, {}),
    "finish": (FILTERS.finish_kernel, sampling_triton.FINISH_WARPS, {"TILES": TILES}),
    "wide": (FILTERS.wide_kernel, sampling_triton.WIDE_WARPS, {"TILES": TILES}),
    "logprob tile": (LOGPROBS.logprob_tile_kernel, LOGPROBS.WARPS, {}),
    "logprob row": (LOGPROBS.logprob_row_kernel, LOGPROBS.WARPS, {"TILES": TILES, "KEYS": 4096}),
}


def compile_kernel(kernel, warps, constants, target):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else TYPES.get(n, "*fp32") for n in names}
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*"},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


def spilled(compiled, tmp_path):
    """Registers or bytes that the compiler moved to memory.

    AMD's scalar registers are not counted: they spill into lanes of vector registers.
    """
    if "amdgcn" in compiled.asm:
        found = re.findall(r"\.vgpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
    else:
        ptx = tmp_path / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, "-v", f"--gpu-name={arch}", ptx, "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        found = re.findall(r"(\d+) bytes spill", report)
    assert found
    return sum(int(count) for count in found)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "logprob row"])
def test_kernel_compiles_for_one_tile_as_triton_specialises_ones(name):
    kernel, warps, constants = KERNELS[name]
    ones = {"tiles": 1} | dict.fromkeys(constants, 1)
    known = {name: value for name, value in ones.items() if name in kernel.arg_names}
    assert compile_kernel(kernel, warps, known, TARGETS["sm_90"]).asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills(name, target, tmp_path):
    compiled = compile_kernel(*KERNELS[name], TARGETS[target])
    assert spilled(compiled, tmp_path) == 0
