"""What the compiler made of the matrix products: the instructions that their speed rests on."""

import re

import pytest

triton = pytest.importorskip("triton")

from millrace.kernels.aot import SPECS, TARGETS, compile_spec  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(SPECS[0].kernel, triton.JITFunction), reason="TRITON_INTERPRET is on"
)

HOPPER = TARGETS["sm_90"]
TWO_PER_SM = 113 * 1024  # of 227 KiB: this kernel and the one that follows it


def compiled(name):
    return compile_spec(next(spec for spec in SPECS if spec.name == name), HOPPER)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("matmul decode gate_up T16", "m64n16k16"),
        ("matmul decode qkv T32", "m64n32k16"),
        ("matmul decode down T64", "m64n64k16"),
        ("lm head draw T16", "m64n16k16"),
    ],
)
def test_few_rows_get_warp_group_instructions_and_two_programs_share_a_processor(name, instruction):
    made = compiled(name)
    assert set(re.findall(r"wgmma\.mma_async\S*?(m64n\d+k16)", made.assembly)) == {instruction}
    assert "mma.sync" not in made.assembly
    assert made.shared <= TWO_PER_SM


@pytest.mark.parametrize("name", ["matmul decode gate_up T16 PDL", "matmul gemv gate_up T1 PDL"])
def test_only_weights_are_asked_for_before_the_wait(name):
    """What the kernel in front writes or reads must be neither read nor written before it ends."""
    before, wait, after = compiled(name).assembly.partition("griddepcontrol.wait")
    assert wait and "prefetch.global.L2" in before
    assert not re.search(r"ld\.global|st\.global|cp\.async|atom\.", before)
    assert "griddepcontrol.launch_dependents" in after


@pytest.mark.parametrize("name", ["matmul decode gate_up T16 TMA", "matmul persistent gate_up TMA"])
def test_descriptors_come_from_the_host_and_tiles_through_tma(name):
    assembly = compiled(name).assembly
    assert "cp.async.bulk.tensor" in assembly
    assert "tensormap.replace" not in assembly, "a descriptor made on the device needs scratch"
    assert not re.search(r"cp\.async\.c[ag]", assembly)


@pytest.mark.parametrize("name", ["matmul gemv gate_up T1", "matmul gemv down T4"])
def test_a_gemv_has_no_barrier_between_its_products(name):
    """Its loads could not be on their way together; only the sum at the end needs one."""
    lines = compiled(name).assembly.splitlines()
    products = [i for i, line in enumerate(lines) if "evict_first" in line or "fma.rn" in line]
    first, last = products[0], max(i for i in products if "evict_first" in lines[i])
    assert not [line for line in lines[first:last] if "bar.sync" in line]
