"""Matrix products in the interpreter: against the definition, and bit for bit over rows."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels import matmul_persistent_triton
from millrace.kernels.configs import LaunchConfig
from millrace.kernels.gemv_triton import linear_gemv
from millrace.kernels.matmul_fused import (
    PLAIN,
    Fusion,
    InputNorm,
    linear_fused_reference,
)
from millrace.kernels.matmul_persistent_triton import linear_persistent
from millrace.kernels.matmul_plan import decode_config, plan
from millrace.kernels.matmul_triton import Workspace, linear_decode

# Masked lanes compute what is not written; NumPy, which plays the GPU here, warns of that.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Relative to outputs of size 1. bf16 is rounded by truncation here.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FUSIONS = ("plain", "bias", "norm silu_mul", "norm bias", "residual")
EVERY_FUSION = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FUSIONS]
    + [(name, dtype) for name in FUSIONS[2::2] for dtype in (torch.float16, torch.bfloat16)],
    ids=str,
)


def layer(n, k, dtype=torch.float32):
    return (torch.randn(n, k) / k**0.5).to(dtype)


def exact_within_steps(rows, n, k):
    """x and weight whose sums of 128 products are exact in any order, as NumPy's order follows the
    tile's shape; sums of such sums are rounded, so the order of steps and splits shows."""
    x, weight = torch.randint(-8, 9, (rows, k)).float(), torch.randint(-8, 9, (n, k)).float()
    size_of_step = torch.rand(rows, -(-k // 128)).mul(16).round().exp2()
    return x * size_of_step.repeat_interleave(128, dim=1)[:, :k], weight / 2**15


def fusion_of(name, rows, n, k, dtype):
    """One of FUSIONS for x [rows, k] and weight [n, k]."""
    return Fusion(
        bias=torch.randn(n).to(dtype) if "bias" in name else None,
        norm=InputNorm(torch.rand(rows, 5) * k, 1e-5) if "norm" in name else None,
        silu_mul="silu_mul" in name,
        residual=torch.randn(rows, n).to(dtype) if name == "residual" else None,
        gamma=torch.randn(n).to(dtype) if name == "residual" else None,
    )


def workspace_for(weight):
    """With NaN wherever a partial sum may lie: what is read must have been written."""
    workspace = Workspace.for_weights([weight])
    workspace.partial.fill_(float("nan"))
    return workspace


def assert_is_defined(output, x, weight, fusion):
    expected = linear_fused_reference(x, weight, fusion)
    tolerance = {"rtol": TOLERANCE[x.dtype], "atol": TOLERANCE[x.dtype]}
    torch.testing.assert_close(output.y, expected.y, **tolerance)
    if expected.scaled is not None:
        torch.testing.assert_close(output.scaled, expected.scaled, **tolerance)
        total = output.y.float().square().sum(1)  # of the row as it was written
        torch.testing.assert_close(output.squares.sum(1), total, rtol=1e-5, atol=1e-5)


@EVERY_FUSION
@pytest.mark.parametrize(("rows", "n", "k", "splits"), [(3, 66, 100, 1), (17, 130, 300, 3)])
def test_decode_with_one_split_and_several(rows, n, k, splits, name, dtype):
    x, weight = torch.randn(rows, k).to(dtype), layer(n, k, dtype)
    fusion, workspace = fusion_of(name, rows, n, k, dtype), workspace_for(weight)
    assert plan(n, k).splits == splits
    assert_is_defined(linear_decode(x, weight, workspace, fusion), x, weight, fusion)
    assert not workspace.tickets.any(), "tickets are ready for the next launch"


@pytest.mark.parametrize("name", ["norm silu_mul", "residual"])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(name):
    n, k = 66, 600
    x, weight = exact_within_steps(64, n, k)
    fusion, workspace = fusion_of(name, 64, n, k, torch.float32), workspace_for(weight)
    assert plan(n, k).splits == 5
    of_all = linear_decode(x, weight, workspace, fusion)
    for rows in (1, 16, 17, 33):
        fewer = Fusion(
            bias=fusion.bias,
            norm=fusion.norm and InputNorm(fusion.norm.squares[:rows], fusion.norm.eps),
            silu_mul=fusion.silu_mul,
            residual=None if fusion.residual is None else fusion.residual[:rows],
            gamma=fusion.gamma,
        )
        output = linear_decode(x[:rows], weight, workspace, fewer)
        assert torch.equal(output.y, of_all.y[:rows])
        if output.squares is not None:
            assert torch.equal(output.scaled, of_all.scaled[:rows])
            assert torch.equal(output.squares, of_all.squares[:rows])


def test_a_forced_width_of_the_tile_changes_no_bit():
    x, weight = exact_within_steps(5, 70, 700)
    workspace = workspace_for(weight)
    narrow = linear_decode(x, weight, workspace)
    assert torch.equal(linear_decode(x, weight, workspace, block_t=64).y, narrow.y)


@EVERY_FUSION
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 1024), (3, 10, 1030)])
def test_gemv(rows, n, k, name, dtype):
    x, weight = torch.randn(rows, k).to(dtype), layer(n, k, dtype)
    fusion = fusion_of(name, rows, n, k, dtype)
    assert_is_defined(linear_gemv(x, weight, fusion), x, weight, fusion)


def test_gemv_gives_a_row_the_same_bits_among_others():
    x, weight = torch.randn(4, 1030), layer(6, 1030)
    together = linear_gemv(x, weight).y
    for i_row in range(4):
        assert torch.equal(linear_gemv(x[i_row : i_row + 1], weight).y[0], together[i_row])
    assert linear_gemv(x[:0], weight).y.shape == (0, 6)
    with pytest.raises(ValueError, match=r"^x: expected at most 4 rows"):
        linear_gemv(torch.zeros(5, 1030), weight)


PREFILL = LaunchConfig(8, 2, {"BLOCK_N": 128, "BLOCK_T": 32, "BLOCK_K": 128, "GROUP": 2, "TMA": 0})


@EVERY_FUSION
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 128), (40, 130, 300)])
def test_persistent(rows, n, k, name, dtype):
    x, weight = torch.randn(rows, k).to(dtype), layer(n, k, dtype)
    fusion = fusion_of(name, rows, n, k, dtype)
    output = linear_persistent(x, weight, fusion, PREFILL)
    assert_is_defined(output, x, weight, fusion)


@pytest.mark.parametrize("num_programs", [1, 3, 100])
def test_every_tile_of_a_prefill_is_done_once(num_programs, monkeypatch):
    """Three tiles of 128 columns and five of 32 rows, in groups of two."""
    monkeypatch.setattr(matmul_persistent_triton, "SMS", num_programs)
    x, weight, residual = torch.randn(150, 64), layer(300, 64), torch.randn(150, 300)
    fusion = Fusion(residual=residual, gamma=torch.ones(300))
    assert_is_defined(linear_persistent(x, weight, fusion, PREFILL), x, weight, fusion)


@pytest.mark.parametrize("name", ["norm silu_mul", "residual"])
def test_a_row_has_the_same_bits_in_a_prefill_as_in_a_decode_step(name):
    n, k = 130, 1200
    x, weight = exact_within_steps(40, n, k)
    fusion, workspace = fusion_of(name, 40, n, k, torch.float32), workspace_for(weight)
    assert plan(n, k).splits == 5
    prefill = linear_persistent(x, weight, fusion, PREFILL)
    decode = linear_decode(x, weight, workspace, fusion)
    assert torch.equal(prefill.y, decode.y)
    if prefill.squares is not None:
        consumer = exact_within_steps(40, 64, n)[1]
        assert torch.equal(prefill.scaled, decode.scaled)
        y_of = [
            linear_decode(
                torch.ones(40, n), consumer, workspace, Fusion(norm=InputNorm(squares, 1e-5))
            ).y
            for squares in (prefill.squares, decode.squares)
        ]
        assert torch.equal(*y_of), "tiles of 64 and of 128 columns add to the same squares"


def with_tma(config):
    return replace(config, constants={**config.constants, "TMA": 1})


def test_tiles_copied_through_descriptors_give_the_same_bits():
    """70 x 66 in tiles of 64 or 128, and K = 152 in steps of 128: all ends are ragged."""
    x, weight = torch.randn(70, 152), layer(66, 152)
    prefill = linear_persistent(x, weight, config=PREFILL).y
    assert torch.equal(linear_persistent(x, weight, config=with_tma(PREFILL)).y, prefill)
    config, workspace = decode_config(weight), workspace_for(weight)
    decode = linear_decode(x[:5], weight, workspace, config=config).y
    described = linear_decode(x[:5], weight, workspace, config=with_tma(config)).y
    assert torch.equal(described, decode)


def test_rows_that_no_descriptor_takes_are_read_through_pointers():
    x, weight = torch.randn(3, 101), layer(8, 101)  # 404 bytes are no multiple of 16
    output = linear_persistent(x, weight, config=with_tma(PREFILL))
    assert_is_defined(output, x, weight, PLAIN)


def test_a_prefill_s_step_must_divide_the_decode_s_split():
    config = LaunchConfig(8, 2, {**PREFILL.constants, "BLOCK_K": 256})
    with pytest.raises(ValueError, match=r"^config: expected a BLOCK_K that divides"):
        linear_persistent(torch.zeros(1, 384), layer(64, 384), config=config)


def test_splits_are_added_in_ascending_order():
    """1e8 + 1 - 1e8 is 0 in float32, and 1 in another order: the sum betrays its order."""
    x, weight = torch.zeros(1, 384), torch.ones(64, 384)
    x[0, 0], x[0, 128], x[0, 256] = 1e8, 1.0, -1e8
    assert plan(64, 384).splits == 3
    assert torch.equal(linear_decode(x, weight, workspace_for(weight)).y, torch.zeros(1, 64))


def test_a_row_of_the_table_says_how_it_is_cut():
    x, weight = torch.randn(2, 256), layer(48, 256)
    constants = {"BLOCK_N": 32, "BLOCK_K": 64, "SPLITS": 2, "PDL": 0, "TMA": 0}
    config = LaunchConfig(num_warps=2, num_stages=2, constants=constants)
    workspace = workspace_for(layer(512, 512))
    assert_is_defined(linear_decode(x, weight, workspace, config=config), x, weight, PLAIN)


def test_a_strided_x_is_read_as_it_lies_and_no_rows_give_none():
    weight, wide = layer(64, 100), torch.randn(3, 200)
    workspace = workspace_for(weight)
    strided = linear_decode(wide[:, 50:150], weight, workspace).y
    assert torch.equal(strided, linear_decode(wide[:, 50:150].contiguous(), weight, workspace).y)
    assert linear_decode(wide[:0, :100], weight, workspace).y.shape == (0, 64)


def test_what_decode_cannot_take_is_named():
    weight = layer(64, 256)
    with pytest.raises(ValueError, match=r"^x: expected at most 64 rows"):
        linear_decode(torch.zeros(65, 256), weight, workspace_for(weight))
    with pytest.raises(ValueError, match=r"^workspace: expected at least"):
        linear_decode(torch.zeros(1, 256), weight, Workspace.for_weights([]))
