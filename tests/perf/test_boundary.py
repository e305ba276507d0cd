"""The boundary between two kernels: what is fitted, and a link that reads nothing too early."""

import re
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")

from millrace.kernels.aot.compiler import TARGETS, KernelSpec, compile_spec  # noqa: E402
from millrace.perf.kernels import link_triton  # noqa: E402
from millrace.perf.kernels.bench_boundary import PREFETCHED, boundaries  # noqa: E402
from millrace.perf.kernels.case import Row  # noqa: E402

LINK = Row("boundary", "link", "millrace", 0, 0, None, {"bytes": 0}, "measured", median_us=9.0)


def test_the_boundary_is_the_time_of_no_bytes_and_the_share_that_of_the_stream():
    sizes = (4_000_000, 8_000_000, 32_000_000)
    rows = [replace(LINK, axes={"bytes": n}, median_us=1.5 + n / 2e6) for n in sizes]
    absent = replace(LINK, provider="millrace PDL", status="skipped", median_us=None)
    (row,) = boundaries([LINK, *rows, absent], copy_bytes_per_s=4e12)
    assert row.median_us == pytest.approx(1.5)
    assert row.share == pytest.approx(0.5)
    assert row.axes == {"bytes": 0} and row.provider == "millrace"


def test_one_size_has_no_fit():
    assert list(boundaries([LINK, replace(LINK, axes={"bytes": 1 << 20})], 4e12)) == []


@pytest.mark.skipif(
    not isinstance(link_triton.link_kernel, triton.JITFunction), reason="TRITON_INTERPRET is on"
)
@pytest.mark.parametrize("early", [False, True])
def test_a_link_touches_nothing_but_its_weight_s_way_to_the_cache_before_it_waits(early):
    constants = {"LENGTH": 4 * link_triton.TILE, "TILE": link_triton.TILE, "PDL": True}
    constants |= {"EARLY": early, "PREFETCH": PREFETCHED, "UNROLL": link_triton.UNROLL}
    constants["DECAY"] = link_triton.DECAY
    types = {"p_weight": "*bf16", "p_state": "*fp32"}
    options = {"num_warps": link_triton.NUM_WARPS, "launch_pdl": True}
    spec = KernelSpec("link", link_triton.link_kernel, types, constants, options)
    made = compile_spec(spec, TARGETS["sm_90"])
    before, wait, after = made.assembly.partition("griddepcontrol.wait")
    assert wait and "prefetch.global.L2" in before
    assert not re.search(r"ld\.global|st\.global|atom\.", before)
    assert ("launch_dependents" in before) == early != ("launch_dependents" in after)
    assert "v4.b32" in after and made.spills == 0, "16 bytes a load"
