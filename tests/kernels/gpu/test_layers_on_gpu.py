"""Norms, activations, cache writes and linear layers on the GPU: the definition's values, and a
token's bits whatever the number of tokens."""

import pytest
import torch

from millrace.kernels.dispatch import operations
from millrace.kernels.rope import rope_table

CACHE_CASES = [
    *((torch.bfloat16, head_dim) for head_dim in (64, 80, 128, 256)),
    (torch.float16, 64),
    (torch.float32, 64),
]
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
TOKENS = (1, 2, 63, 64, 65, 1000)
BLOCK_SIZE = 16
EPS = 1e-5


def random(*shape, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def assert_close(got, wanted, dtype):
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
def test_norms(gpu, dtype, hidden):
    triton, wanted = operations(gpu, "triton"), operations(gpu, "reference")
    weight = random(hidden, dtype=dtype, device=gpu, seed=1)
    x, residual = (random(65, hidden, dtype=dtype, device=gpu, seed=s) for s in (2, 3))
    args = (weight, EPS)
    assert_close(triton.rms_norm(x, *args), wanted.rms_norm(x, *args), dtype)
    both = triton.add_rms_norm(x, residual, *args), wanted.add_rms_norm(x, residual, *args)
    for got, want in zip(*both, strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("operation", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("width", [1536, 8192, 14336])
def test_activations(gpu, dtype, operation, width):
    gate_up = random(65, 2 * width, dtype=dtype, device=gpu)
    got = getattr(operations(gpu, "triton"), operation)(gate_up)
    assert_close(got, getattr(operations(gpu, "reference"), operation)(gate_up), dtype)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_tokens_bits_do_not_depend_on_the_others(gpu, tokens):
    table = operations(gpu, "triton")
    weight = random(4096, dtype=torch.bfloat16, device=gpu)
    x = random(1000, 4096, dtype=torch.bfloat16, device=gpu, seed=1)
    few = x[:tokens].contiguous()
    assert torch.equal(table.rms_norm(few, weight, EPS), table.rms_norm(x, weight, EPS)[:tokens])
    assert torch.equal(table.silu_mul(few), table.silu_mul(x)[:tokens])


@pytest.mark.parametrize(("dtype", "head_dim"), CACHE_CASES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [1, 65])
def test_kv_append_writes_its_rows_and_no_other(gpu, dtype, head_dim, normed, tokens):
    heads, kv_heads = 6, 2
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=gpu)
    blocks = tokens // BLOCK_SIZE + 2
    write_index = torch.randperm(blocks * BLOCK_SIZE, device=gpu)[:tokens].contiguous()
    positions = torch.arange(7, 7 + tokens, device=gpu)
    cos_sin = rope_table(head_dim, 100, 10_000.0, device=gpu)
    norms = [random(head_dim, dtype=dtype, device=gpu, seed=s) if normed else None for s in (1, 2)]
    results = []
    for backend in ("triton", "reference"):
        shape = (blocks, BLOCK_SIZE, kv_heads, head_dim)
        caches = [torch.full(shape, torch.nan, dtype=dtype, device=gpu) for _ in range(2)]
        inputs = (qkv, positions, write_index, cos_sin, *caches, heads)
        results.append((operations(gpu, backend).kv_append(*inputs, *norms), *caches))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert_close(got.nan_to_num(), wanted.nan_to_num(), dtype)


@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 8192), (1280, 8192)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 64, 65, 300])
def test_a_linear_layer_is_the_product_in_float32(gpu, shape, rows):
    weight = random(*shape, dtype=torch.bfloat16, device=gpu)
    x = random(rows, shape[1], dtype=torch.bfloat16, device=gpu, seed=1)
    got = operations(gpu, "triton").pack_linear(weight)(x)
    assert_close(got, x.float() @ weight.float().T, torch.bfloat16)
