"""Binaries that were compiled for a GPU that is not here lie where a launch on that GPU looks."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from millrace.kernels import gemv_triton, norm_triton  # noqa: E402
from millrace.kernels.aot import SPECS, TARGETS, compile_spec  # noqa: E402
from millrace.kernels.matmul_fused import Fusion, InputNorm  # noqa: E402
from millrace.kernels.rows_triton import rows_of  # noqa: E402
from millrace.kernels.sampling_filters_triton import gather_kernel  # noqa: E402
from millrace.kernels.sampling_triton import GATHER_OPTIONS  # noqa: E402
from millrace.kernels.slot_sampling import SlotSampling  # noqa: E402

KERNELS = (norm_triton.rms_norm_kernel, gemv_triton.gemv_kernel, gather_kernel)
TARGET = TARGETS["sm_90"]
pytestmark = pytest.mark.skipif(
    not isinstance(KERNELS[0], triton.JITFunction), reason="TRITON_INTERPRET is on"
)


class DriverOfAbsentGPU:
    """What a launch asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET.gpu


@pytest.fixture
def found_by(monkeypatch, tmp_path):
    """found_by(call): whether each launch in `call` found its binary. Launches end after that."""
    run = triton.JITFunction.run

    def look_up(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", look_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", DriverOfAbsentGPU())
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))

    def found(call):
        hits = []
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
            call()
        return hits

    return found


def spec_of(name):
    return next(spec for spec in SPECS if spec.name == name)


@pytest.mark.parametrize("rows", [1, 70])
def test_a_launch_finds_what_was_compiled_for_its_signature_and_nothing_else(found_by, rows):
    def launch(hidden):
        x, weight = torch.zeros(rows, hidden).bfloat16(), torch.ones(hidden).bfloat16()
        return lambda: norm_triton.add_rms_norm(x, x.clone(), weight, 1e-5)

    compile_spec(spec_of("add and norm E576"), TARGET)
    assert found_by(launch(576)) == [True]
    assert found_by(launch(640)) == [False]


def test_so_does_a_launch_whose_rows_are_a_tuple(found_by):
    spec = spec_of("sampling gather")
    zero, numbers = torch.zeros(1, dtype=torch.int64), torch.zeros(4096, dtype=torch.int32)

    def launch(dtype):
        rows = rows_of(torch.zeros(1, 5001).to(dtype), zero, zero, SlotSampling.zeros(1, 5001))
        lists = (numbers.float(), numbers, numbers, numbers, numbers.long())
        return lambda: gather_kernel[(1, 1)](rows, *lists, **GATHER_OPTIONS)

    compile_spec(spec, TARGET)
    assert found_by(launch(torch.bfloat16)) == [True]
    assert found_by(launch(torch.float32)) == [False]


def test_an_epilogue_and_dependent_launch_are_spelt_as_in_a_launch(found_by):
    """A named tuple with pointers, constants and None; an option; constants that are bool."""
    spec = spec_of("matmul gemv gate_up T1 PDL")
    n, k = 64, 4096
    x, weight = torch.zeros(1, k).bfloat16(), torch.zeros(n, k).bfloat16()
    fusion = Fusion(norm=InputNorm(torch.zeros(1, 64), 1e-5), silu_mul=True)
    config = gemv_triton.gemv_config(weight)
    config = replace(config, constants={**config.constants, "PDL": 1})
    compile_spec(replace(spec, constants={**spec.constants, "N": n}), TARGET)
    assert found_by(lambda: gemv_triton.linear_gemv(x, weight, fusion, config)) == [True]
