"""Each kernel is compiled ahead of time with the options and kinds of constants of its launches.

The launchers run on tensors of the CPU, and their launches are recorded in the place of Triton's.
"""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from millrace.kernels.activation_triton import gelu_tanh_mul, silu_mul  # noqa: E402
from millrace.kernels.aot import SPECS  # noqa: E402
from millrace.kernels.append_attention_triton import append_attention  # noqa: E402
from millrace.kernels.attention import prepare_attention  # noqa: E402
from millrace.kernels.attention_triton import paged_attention  # noqa: E402
from millrace.kernels.gemv_triton import gemv_config, linear_gemv  # noqa: E402
from millrace.kernels.kv_append_triton import kv_append  # noqa: E402
from millrace.kernels.lm_head_triton import draw_from_hidden  # noqa: E402
from millrace.kernels.logprobs_triton import (  # noqa: E402
    drawn_logprobs_triton,
    raw_logprobs_triton,
)
from millrace.kernels.matmul_fused import PLAIN  # noqa: E402
from millrace.kernels.matmul_persistent_triton import linear_persistent  # noqa: E402
from millrace.kernels.matmul_plan import decode_config  # noqa: E402
from millrace.kernels.matmul_triton import Workspace, decode_options, linear_decode  # noqa: E402
from millrace.kernels.norm_triton import rms_norm  # noqa: E402
from millrace.kernels.sampling_triton import sample_triton  # noqa: E402
from millrace.kernels.slot_sampling import SlotSampling  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(SPECS[0].kernel, triton.JITFunction), reason="TRITON_INTERPRET is on"
)

SIZES = ("num_warps", "num_stages")  # whose values follow from the shape and the device
VOCAB, HIDDEN = 64, 32
X, WEIGHT = torch.zeros(3, HIDDEN).bfloat16(), torch.zeros(VOCAB, HIDDEN).bfloat16()
SLOTS = torch.zeros(3, dtype=torch.int64)


@pytest.fixture
def launched(monkeypatch):
    """The options of each launch and the types of its constants, by kernel; nothing runs."""
    found = defaultdict(set)

    def record(self, *args, grid, warmup, **kwargs):
        options = {n: v for n, v in kwargs.items() if n not in self.arg_names}
        constants = dict(zip(self.arg_names, args, strict=False)) | kwargs
        found[name_of(self)].add((given(options), kinds(self, constants)))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return found


def name_of(kernel):
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def kinds(kernel, constants):
    """False and 0 are two binaries."""
    return frozenset((p.name, type(constants[p.name])) for p in kernel.params if p.is_constexpr)


def given(options):
    return frozenset((name, "?" if name in SIZES else value) for name, value in options.items())


def launch_attention(attention_case, decode_case):
    case = attention_case([300, 40, 20], [1, 1, 20], head_dim=16)
    prepared = prepare_attention(case.batch, case.block_size, None)
    paged_attention(case.q, case.k_cache, case.v_cache, prepared, scale=1.0)
    append_attention(*decode_case([300, 40], head_dim=16), scale=1.0)


def launch_products():
    pdl = {"PDL": 1, "TMA": 0}
    workspace = Workspace.for_weights([WEIGHT])
    for constants in ({}, pdl):
        decode, gemv = decode_config(WEIGHT), gemv_config(WEIGHT)
        decode = replace(decode, constants={**decode.constants, **constants})
        gemv = replace(gemv, constants={**gemv.constants, **constants})
        linear_decode(X, WEIGHT, workspace, PLAIN, decode)
        linear_gemv(X, WEIGHT, PLAIN, gemv)
    linear_persistent(X, WEIGHT)
    draw_from_hidden(X, WEIGHT, SLOTS, SLOTS, SlotSampling.zeros(1, VOCAB))


def launch_sampling():
    logits, params = torch.zeros(3, VOCAB), SlotSampling.zeros(1, VOCAB)
    sampled = sample_triton(logits, SLOTS, SLOTS, params, scored=True)
    drawn_logprobs_triton(logits, SLOTS, SLOTS, params, sampled, num_top=2)
    raw_logprobs_triton(logits, SLOTS, num_top=2)


def test_specs_have_the_options_of_the_launches(launched, attention_case, decode_case, append_case):
    launch_attention(attention_case, decode_case)
    launch_products()
    launch_sampling()
    kv_append(**append_case(3, 4, 2, 16, torch.float32))
    rms_norm(X, torch.zeros(HIDDEN).bfloat16(), 1e-6)
    silu_mul(X)
    gelu_tanh_mul(X)
    compiled = defaultdict(set)
    for spec in SPECS:
        compiled[name_of(spec.kernel)].add(
            (given(spec.options), kinds(spec.kernel, spec.constants))
        )
    assert dict(launched) == dict(compiled)


@pytest.mark.parametrize(("block_t", "stages"), [(16, 4), (32, 4), (64, 3)])
def test_a_wide_tile_keeps_fewer_steps_in_flight(block_t, stages):
    config = replace(decode_config(WEIGHT), num_stages=4)
    assert decode_options(config, block_t)["num_stages"] == stages
