"""Matrix products on the GPU: right, the same bits for any rows, and safe to replay in a graph.

The interpreter cannot say how a tensor core adds. Whether instructions of different width give a
row the same bits is found out here: deterministic serving rests on it.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels.gemv_triton import linear_gemv
from millrace.kernels.lm_head_triton import draw_from_hidden
from millrace.kernels.matmul_fused import Fusion, InputNorm, linear_fused_reference
from millrace.kernels.matmul_persistent_triton import linear_persistent
from millrace.kernels.matmul_plan import decode_config
from millrace.kernels.matmul_triton import Workspace, linear_decode
from millrace.kernels.sampling import SlotSampling, SlotValues
from millrace.kernels.sampling_triton import sample_triton

CASES = [  # each is compiled anew, which takes a second: few, and unlike one another
    ("norm bias", 6144, 4096, torch.bfloat16),
    ("norm silu_mul", 16384, 2048, torch.bfloat16),
    ("residual", 4096, 14336, torch.bfloat16),
    ("plain", 1280, 8192, torch.bfloat16),
    ("residual", 1000, 576, torch.float16),
]
EVERY_CASE = pytest.mark.parametrize(("name", "n", "k", "dtype"), CASES, ids=str)
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # of outputs of size 1, rounded once


def tensors(rows, n, k, dtype):
    random = torch.Generator("cuda").manual_seed(n + k + rows)
    x = torch.randn(rows, k, generator=random, device="cuda").to(dtype)
    weight = (torch.randn(n, k, generator=random, device="cuda") / k**0.5).to(dtype)
    return x, weight


def fusion_of(name, rows, n, k, dtype):
    random = torch.Generator("cuda").manual_seed(n)

    def some(*shape):
        return torch.randn(*shape, generator=random, device="cuda").to(dtype)

    squares = torch.rand(rows, 48, generator=random, device="cuda") * k / 24
    return Fusion(
        bias=some(n) if "bias" in name else None,
        norm=InputNorm(squares, 1e-5) if "norm" in name else None,
        silu_mul="silu_mul" in name,
        residual=some(rows, n) if name == "residual" else None,
        gamma=some(n) if name == "residual" else None,
    )


def first_rows(fusion, rows):
    return Fusion(
        bias=fusion.bias,
        norm=fusion.norm and InputNorm(fusion.norm.squares[:rows], fusion.norm.eps),
        silu_mul=fusion.silu_mul,
        residual=None if fusion.residual is None else fusion.residual[:rows],
        gamma=fusion.gamma,
    )


def workspace_for(weight):
    workspace = Workspace.for_weights([weight])
    workspace.partial.fill_(float("nan"))
    return workspace


def assert_is_defined(output, x, weight, fusion):
    expected = linear_fused_reference(x, weight, fusion)
    tolerance = {"rtol": TOLERANCE[x.dtype], "atol": TOLERANCE[x.dtype]}
    torch.testing.assert_close(output.y, expected.y, **tolerance)
    if expected.scaled is not None:
        total = output.y.float().square().sum(1)
        torch.testing.assert_close(output.squares.sum(1), total, rtol=1e-4, atol=0)


@EVERY_CASE
def test_every_form_computes_what_is_defined(name, n, k, dtype):
    for rows in (1, 3, 16, 33, 64, 200):
        x, weight = tensors(rows, n, k, dtype)
        fusion = fusion_of(name, rows, n, k, dtype)
        assert_is_defined(linear_persistent(x, weight, fusion), x, weight, fusion)
        if rows <= 64:
            output = linear_decode(x, weight, workspace_for(weight), fusion)
            assert_is_defined(output, x, weight, fusion)
        if rows <= 4:
            assert_is_defined(linear_gemv(x, weight, fusion), x, weight, fusion)


@pytest.mark.parametrize("block_t", [32, 64])
@EVERY_CASE
def test_the_instruction_s_width_changes_no_bit(name, n, k, dtype, block_t):
    """n16 against n32 and n64 on Hopper, for the same rows."""
    x, weight = tensors(16, n, k, dtype)
    fusion, workspace = fusion_of(name, 16, n, k, dtype), workspace_for(weight)
    narrow = linear_decode(x, weight, workspace, fusion, block_t=16).y
    assert torch.equal(linear_decode(x, weight, workspace, fusion, block_t=block_t).y, narrow)


@EVERY_CASE
def test_a_row_has_the_same_bits_among_any_number_of_rows(name, n, k, dtype):
    x, weight = tensors(300, n, k, dtype)
    fusion, workspace = fusion_of(name, 300, n, k, dtype), workspace_for(weight)
    prefill = linear_persistent(x, weight, fusion)
    for rows in (1, 8, 17, 64):
        decode = linear_decode(x[:rows], weight, workspace, first_rows(fusion, rows))
        assert torch.equal(decode.y, prefill.y[:rows])
        if prefill.squares is not None:  # tiles of 128 columns there, of 64 here
            pairs = torch.nn.functional.pad(decode.squares, (0, decode.squares.shape[1] % 2))
            assert torch.equal(pairs[:, 0::2] + pairs[:, 1::2], prefill.squares[:rows])


def test_a_gemv_gives_a_row_the_same_bits_among_others():
    x, weight = tensors(4, 4096, 4096, torch.bfloat16)
    together = linear_gemv(x, weight).y
    for i_row in range(4):
        assert torch.equal(linear_gemv(x[i_row : i_row + 1], weight).y[0], together[i_row])


def test_splits_that_arrive_in_any_order_give_the_same_bits():
    x, weight = tensors(16, 1280, 8192, torch.bfloat16)
    workspace = workspace_for(weight)
    assert decode_config(weight).constants["SPLITS"] > 1
    first = linear_decode(x, weight, workspace).y
    for _ in range(300):
        assert torch.equal(linear_decode(x, weight, workspace).y, first)
    assert not workspace.tickets.any()


def test_a_chain_replays_in_a_graph_with_the_same_bits():
    """Two layers that share a workspace, ten replays on new inputs."""
    x, down = tensors(16, 4096, 14336, torch.bfloat16)
    _, qkv = tensors(16, 6144, 4096, torch.bfloat16)
    residual = torch.randn(16, 4096, device="cuda").bfloat16()
    gamma = torch.rand(4096, device="cuda").bfloat16()
    workspace = Workspace.for_weights([down, qkv])

    def layers():
        added = linear_decode(x, down, workspace, Fusion(residual=residual, gamma=gamma))
        norm = InputNorm(added.squares, 1e-5)
        return linear_decode(added.scaled, qkv, workspace, Fusion(norm=norm)).y

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for _ in range(10):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, layers())


@pytest.mark.parametrize("variant", ["PDL", "TMA"])
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="of sm_90 and later",
)
def test_a_chain_that_starts_early_or_copies_by_tma_has_the_same_bits(variant):
    """Forty dependent layers in a graph: each reads what the one before wrote, and its scratch."""
    x, weight = tensors(16, 4096, 4096, torch.bfloat16)
    workspace, config = workspace_for(weight), decode_config(weight)
    changed = replace(config, constants={**config.constants, variant: 1})

    def chain(config):
        y = x
        for _ in range(40):
            y = linear_decode(y, weight, workspace, config=config).y
        return y

    expected = chain(config)
    chain(changed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(changed)
    for _ in range(50):
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize(("vocab", "k"), [(128256, 2048), (49152, 576)])
def test_the_fused_draw_takes_the_sampler_s_token(vocab, k):
    for rows in (1, 20, 64):
        x, head = tensors(rows, vocab, k, torch.bfloat16)
        params = SlotSampling.zeros(64, vocab, "cuda")
        for slot in range(64):
            params.write(slot, SlotValues(temperature=slot % 3 * 0.6, seed=slot))
        slots = torch.randperm(64, device="cuda")[:rows]
        positions = torch.randint(1 << 40, (rows,), device="cuda")
        logits = linear_decode(x, head, workspace_for(head)).y
        expected = sample_triton(logits, slots, positions, params)
        fused = draw_from_hidden(x, head, slots, positions, params)
        assert torch.equal(fused.token_ids, expected.token_ids)
        assert fused.ok.all() and expected.ok.all()
