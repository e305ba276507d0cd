"""Norm, activation and kv_append compiled, at the sizes of models, against their definitions."""

import math

import pytest
import torch

from millrace.kernels.activation_triton import gelu_tanh_mul, silu_mul
from millrace.kernels.attention import KVScales
from millrace.kernels.kv_append import FP8, kv_append_reference, to_fp8
from millrace.kernels.kv_append import kv_append as kv_append_torch
from millrace.kernels.kv_append_triton import kv_append
from millrace.kernels.norm import rms_norm_reference
from millrace.kernels.norm_triton import add_rms_norm, rms_norm

# Steps of the dtype: sums in another order, a fused a * b + c, and a GPU's own rsqrt, exp and /.
STEPS = {torch.float32: 8, torch.float16: 2, torch.bfloat16: 2}
LOGIT_STEPS = 4  # of float32: what exp turns into a relative error
FP8_NAN = 0x7F
DTYPES = pytest.mark.parametrize("dtype", STEPS, ids=str)


def step(dtype):
    return STEPS[dtype] * torch.finfo(dtype).eps


def on_gpu(arguments):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


# ---------------------------------------------------------------- norm


@DTYPES
@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(
    ("tokens", "hidden"),
    [(8192, 4096), (333, 576), (1001, 5120), (77, 16384), (4099, 128), (65, 1025), (1, 48)],
)
def test_norm_is_the_defined_one(tokens, hidden, dtype):
    x, residual = random(tokens, hidden, dtype=dtype) * 3, random(tokens, hidden, dtype=dtype)
    weight = random(hidden, dtype=dtype)
    tolerance = {"rtol": step(dtype), "atol": torch.finfo(dtype).eps * 1e-3}
    y, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, x + residual)
    expected = rms_norm_reference(new_residual, weight, 1e-5)
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), **tolerance
    )


@DTYPES
@pytest.mark.parametrize("hidden", [64, 128, 576, 1025, 4096, 5120, 16384])
def test_a_normed_row_has_the_same_bits_whatever_the_number_of_tokens_and_its_place(hidden, dtype):
    x, residual = random(1025, hidden, dtype=dtype), random(1025, hidden, dtype=dtype)
    weight = random(hidden, dtype=dtype)
    together = add_rms_norm(x, residual, weight, 1e-5)
    for start, stop in ((0, 1), (1024, 1025), (3, 258), (256, 512), (7, 264), (31, 34)):
        rows = slice(start, stop)
        part = add_rms_norm(x[rows], residual[rows], weight, 1e-5)
        for alone, among in zip(part, together, strict=True):
            assert torch.equal(alone, among[rows])


# ---------------------------------------------------------------- activation


@DTYPES
@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(("tokens", "ffn"), [(2048, 14336), (333, 1536), (65, 2049), (1, 63)])
@pytest.mark.parametrize("form", [silu_mul, gelu_tanh_mul])
def test_activation_is_the_formula(form, tokens, ffn, dtype):
    gate_up = random(tokens, 2 * ffn, dtype=dtype) * 3
    a, up = gate_up.double().chunk(2, dim=1)
    logit = a if form is silu_mul else 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    y = a / (1 + torch.exp(-logit)) * up
    relative = step(dtype) + LOGIT_STEPS * 2.0**-23 * logit.abs()
    underflow = (a * up).abs() * 2.0**-125 + 4 * torch.finfo(dtype).smallest_normal
    error = (form(gate_up).double() - y).abs()
    assert (error <= relative * y.abs() + underflow).all()


@pytest.mark.parametrize("form", [silu_mul, gelu_tanh_mul])
def test_an_activated_row_has_the_same_bits_whatever_the_number_of_tokens(form):
    gate_up = random(257, 2 * 8192, dtype=torch.bfloat16)
    together = form(gate_up)
    for start, stop in ((0, 1), (256, 257), (3, 67)):
        assert torch.equal(form(gate_up[start:stop]), together[start:stop])


# ---------------------------------------------------------------- kv_append

HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (9, 3, 64), (32, 32, 80), (12, 4, 96), (16, 8, 256), (5, 1, 128)],
)


@HEADS
@DTYPES
@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
def test_kv_append_is_the_defined_one(append_case, norm, heads, kv_heads, head_dim, dtype):
    arguments = append_case(97, heads, kv_heads, head_dim, dtype, norm=norm)
    arguments["write_index"][::7] = -1
    actual = on_gpu(arguments)
    q, expected_q = kv_append(**actual), kv_append_reference(**arguments)
    tolerance = {"rtol": step(dtype), "atol": 2 * step(dtype), "equal_nan": True}
    torch.testing.assert_close(q.cpu(), expected_q, **tolerance)
    torch.testing.assert_close(actual["k_cache"].cpu(), arguments["k_cache"], **tolerance)
    torch.testing.assert_close(
        actual["v_cache"].cpu(), arguments["v_cache"], rtol=0, atol=0, equal_nan=True
    )


@HEADS
def test_an_appended_token_has_the_same_bits_alone_and_among_others(
    append_case, heads, kv_heads, head_dim
):
    case = append_case(4096, heads, kv_heads, head_dim, torch.bfloat16, norm=True, blocks=257)
    arguments = on_gpu(case)
    together = kv_append(**arguments)
    for start, stop in ((0, 1), (4095, 4096), (7, 264)):
        part = {n: arguments[n][start:stop] for n in ("qkv", "positions", "write_index")}
        k_cache = torch.full_like(arguments["k_cache"], float("nan"))
        alone = kv_append(**(arguments | part | {"k_cache": k_cache}))
        assert torch.equal(alone, together[start:stop])
        rows = part["write_index"]
        written = arguments["k_cache"].flatten(0, 1)[rows]
        assert torch.equal(k_cache.flatten(0, 1)[rows], written)


@HEADS
@DTYPES
def test_an_fp8_cache_holds_what_a_plain_one_would_rounded_to_e4m3(
    append_case, heads, kv_heads, head_dim, dtype
):
    plain = on_gpu(append_case(97, heads, kv_heads, head_dim, dtype, norm=True))
    shape = plain["k_cache"].shape
    scales = KVScales(*(torch.rand(2, kv_heads, device="cuda") + 0.003))
    bytes_of = {n: torch.full(shape, FP8_NAN, dtype=torch.uint8).cuda() for n in "kv"}
    caches = {f"{n}_cache": stored.view(FP8) for n, stored in bytes_of.items()}
    assert torch.equal(kv_append(**plain), kv_append(**(plain | caches), kv_scales=scales))
    rows = plain["write_index"]
    for n, scale in (("k", scales.key), ("v", scales.value)):
        written = plain[f"{n}_cache"].flatten(0, 1)[rows]
        expected = to_fp8(written.cpu(), scale.cpu()).view(torch.uint8)
        assert torch.equal(bytes_of[n].flatten(0, 1)[rows].cpu(), expected)


@pytest.mark.parametrize("kv_append", [kv_append, kv_append_torch], ids=["triton", "torch"])
def test_a_graph_replays_with_other_tokens_and_with_padding(append_case, kv_append):
    captured, later = (append_case(64, 32, 8, 128, torch.bfloat16) for _ in range(2))
    later["write_index"][50:] = -1
    arguments = on_gpu(captured)
    kv_append(**arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = kv_append(**arguments)
    for name in ("qkv", "positions", "write_index", "k_cache", "v_cache"):
        arguments[name].copy_(later[name])
    graph.replay()
    expected = on_gpu(later)
    assert torch.equal(q, kv_append(**expected))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(arguments[name], expected[name], rtol=0, atol=0, equal_nan=True)
    untouched = arguments["k_cache"].flatten(0, 1).isnan().all(dim=(1, 2)).sum()
    assert untouched == 7 * 16 - 50
