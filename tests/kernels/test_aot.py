"""Every kernel compiles for GPUs that are not here, spills no register and fits the memory."""

from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from millrace.kernels.aot import SPECS, TARGETS, compile_spec  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(SPECS[0].kernel, triton.JITFunction), reason="TRITON_INTERPRET is on"
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_kernel_compiles_without_spills(spec, target):
    if target not in spec.targets:
        pytest.skip(f"not built for {target}")
    made = compile_spec(spec, TARGETS[target])
    assert made.spills == 0
    assert made.shared <= TARGETS[target].shared_limit


def test_names_are_unique():
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_the_page_on_kernels_has_a_row_for_each():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = page.partition("## What the compilers make of them")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [spec.name for spec in SPECS]


def test_the_count_notices_a_tile_too_large_for_its_registers():
    spec = SPECS[0]
    crowded = replace(spec, constants={**spec.constants, "BLOCK_M": 64}, options={"num_warps": 1})
    assert compile_spec(crowded, TARGETS["sm_90"]).spills > 0


def test_an_argument_without_a_type_is_named():
    spec = replace(SPECS[0], types={})
    with pytest.raises(ValueError, match="no type for p_q"):
        compile_spec(spec, TARGETS["sm_90"])
