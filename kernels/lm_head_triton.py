"""The last layer and the draw on a GPU, in Triton; `lm_head.py` says what it computes.

Two launches, neither of which waits for the host:

    head     block of 64 token ids   the product with all rows of x, K in the order of
                                     `matmul_triton.py`; temperature, noise, the block's best
    best     row                     the best of its blocks

A call of the noise's generator makes the words of four ids that lie 1024 apart (`rng.py`), so a
block is CALLS_PER_BLOCK ids from each quarter of a tile of 4096: row 4 j + w of the block's tile is
id tile * 4096 + w * 1024 + first call + j, and no word is thrown away.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.checks import expect
from millrace.kernels.configs import LaunchConfig
from millrace.kernels.matmul_fused import Fusion, InputNorm, check_linear
from millrace.kernels.matmul_plan import MAX_ROWS, decode_config, split_length
from millrace.kernels.matmul_tile_triton import inverse_rms, product_of_splits
from millrace.kernels.matmul_triton import MIN_BLOCK_T, decode_options
from millrace.kernels.order_triton import NO_ID
from millrace.kernels.rng import CALLS_PER_TILE, TILE, WORDS
from millrace.kernels.rng_triton import gumbel_calls
from millrace.kernels.rows_triton import TEMPERATURE, scalar
from millrace.kernels.sampling import GREEDY_BELOW, SampledTokens, SlotSampling

CALLS_PER_BLOCK = 16
BLOCKS_PER_TILE = CALLS_PER_TILE // CALLS_PER_BLOCK
BEST_OPTIONS = {"num_warps": 8}

_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_BLOCK_CALLS = tl.constexpr(CALLS_PER_BLOCK)
_BLOCKS = tl.constexpr(BLOCKS_PER_TILE)
_BLOCK_V = tl.constexpr(CALLS_PER_BLOCK * WORDS)
_WORDS = tl.constexpr(WORDS)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


@triton.jit(do_not_specialize=["num_rows", "blocks"])
def head_kernel(
    p_x,  # [R, K]
    p_head,  # [V, K]
    p_norm_squares,  # f32 [R, NORM_TILES] or None
    p_slots,  # i64 [R]
    p_positions,  # i64 [R]
    p_scalars,  # f32 [S, len(SCALARS)]
    p_seed,  # i64 [S]
    p_best,  # f32 [R, blocks], the block's best score; NaN if it holds one
    p_best_id,  # i32 [R, blocks]
    num_rows,
    blocks,
    stride_x,
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_LENGTH: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_tile, first_call = i_block // _BLOCKS, i_block % _BLOCKS * _BLOCK_CALLS
    o_v = tl.arange(0, _BLOCK_V)
    o_v = i_tile * _TILE + o_v % _WORDS * _CALLS + first_call + o_v // _WORDS
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < num_rows
    o_row = tl.minimum(o_t, num_rows - 1).to(tl.int64)
    # Ids and rows past the end are the last ones again: computed, and masked below.
    p_w = p_head + tl.minimum(o_v, V - 1).to(tl.int64)[:, None] * K
    p_row = p_x + o_row[:, None] * stride_x
    b_x = product_of_splits(
        p_w, p_row, 0, 0, K, SPLITS, SPLIT_LENGTH, _BLOCK_V, BLOCK_T, BLOCK_K, False, UPCAST
    )
    if p_norm_squares is not None:
        b_x *= inverse_rms(p_norm_squares, o_row, m_t, eps, K, NORM_TILES, BLOCK_T)[None, :]
    b_x = b_x.to(p_x.dtype.element_ty).to(tl.float32)  # [BLOCK_V, BLOCK_T], logits
    b_x = tl.where((o_v < V)[:, None], b_x, float("-inf"))
    b_nan = tl.max((b_x != b_x).to(tl.int32), axis=0)

    b_slot = tl.load(p_slots + o_row)
    b_position = tl.load(p_positions + o_row)
    b_temperature = scalar(p_scalars, b_slot, TEMPERATURE)
    m_greedy = b_temperature < _GREEDY_BELOW
    b_inverse = tl.div_rn(tl.full([BLOCK_T], 1.0, tl.float32), b_temperature)
    o_call = i_tile * _CALLS + first_call + tl.arange(0, _BLOCK_CALLS)
    o_call = o_call[:, None] + tl.zeros([1, BLOCK_T], tl.int32)
    b_g = gumbel_calls(tl.load(p_seed + b_slot)[None, :], b_position[None, :], o_call)
    b_g = tl.reshape(tl.permute(b_g, (0, 2, 3, 1)), (_BLOCK_V, BLOCK_T))
    b_score = tl.where(m_greedy[None, :], b_x, b_x * b_inverse[None, :] + b_g)
    b_best = tl.max(b_score, axis=0)
    b_winner = tl.min(tl.where(b_score == b_best[None, :], o_v[:, None], NO_ID), axis=0)
    o_out = o_row * blocks + i_block
    tl.store(p_best + o_out, tl.where(b_nan != 0, float("nan"), b_best), mask=m_t)
    tl.store(p_best_id + o_out, b_winner, mask=m_t)


@triton.jit
def best_kernel(
    p_best,  # f32 [R, BLOCKS]
    p_best_id,  # i32 [R, BLOCKS]
    p_token_ids,  # i64 [R]
    p_ok,  # bool [R]
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_block = tl.arange(0, PADDED)
    m_block = o_block < BLOCKS
    o_in = i_row * BLOCKS + o_block
    b_best = tl.load(p_best + o_in, mask=m_block, other=float("-inf"))
    b_id = tl.load(p_best_id + o_in, mask=m_block, other=NO_ID)
    best = tl.max(b_best, axis=0)
    token_id = tl.min(tl.where(b_best == best, b_id, NO_ID), axis=0)
    ok = (best > float("-inf")) & (tl.max((b_best != b_best).to(tl.int32), axis=0) == 0)
    tl.store(p_ok + i_row, ok)
    tl.store(p_token_ids + i_row, tl.where(ok, token_id, 0).to(tl.int64))


def num_blocks(vocab: int) -> int:
    """Blocks that hold an id below vocab. Example: 4096 + 20 ids are 64 blocks and 2."""
    tiles, rest = divmod(vocab, TILE)
    return tiles * BLOCKS_PER_TILE + min(BLOCKS_PER_TILE, math.ceil(rest / CALLS_PER_BLOCK))


def draw_from_hidden(
    x: Tensor,
    head: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    norm: InputNorm | None = None,
    config: LaunchConfig | None = None,
) -> SampledTokens:
    """`draw_from_hidden_reference` on the device, for at most MAX_ROWS rows; never waits for it.

    The caller knows that no row asks for more than a temperature. `config` is that of the layer
    alone, `decode_config(head)` where not given: its steps and splits decide the logits' bits.
    """
    check_linear(x, head, Fusion(norm=norm))
    rows, (vocab, k) = x.shape[0], head.shape
    _check_draw(rows, vocab, slots, positions, params)
    sampled = SampledTokens(torch.empty_like(slots), torch.empty_like(slots, dtype=torch.bool))
    if rows == 0:
        return sampled
    config = config or decode_config(head)
    splits, block_k = config.constants["SPLITS"], config.constants["BLOCK_K"]
    blocks, block_t = num_blocks(vocab), max(MIN_BLOCK_T, triton.next_power_of_2(rows))
    best = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
    best_id = torch.empty(rows, blocks, dtype=torch.int32, device=x.device)
    head_kernel[(blocks,)](
        p_x=x,
        p_head=head,
        p_norm_squares=None if norm is None else norm.squares,
        p_slots=slots,
        p_positions=positions,
        p_scalars=params.scalars,
        p_seed=params.seed,
        p_best=best,
        p_best_id=best_id,
        num_rows=rows,
        blocks=blocks,
        stride_x=x.stride(0),
        eps=0.0 if norm is None else norm.eps,
        V=vocab,
        K=k,
        SPLITS=splits,
        SPLIT_LENGTH=split_length(k, splits, block_k),
        NORM_TILES=1 if norm is None else norm.squares.shape[1],
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        UPCAST=x.device.type == "cpu",
        **decode_options(config, block_t),  # logits / temperature + g rounds twice, as in sampling
    )
    padded = triton.next_power_of_2(blocks)
    best_kernel[(rows,)](
        best, best_id, sampled.token_ids, sampled.ok, blocks, padded, **BEST_OPTIONS
    )
    return sampled


def _check_draw(
    rows: int, vocab: int, slots: Tensor, positions: Tensor, params: SlotSampling
) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows, got {rows}")
    if vocab != params.vocab:
        raise ValueError(f"head: expected {params.vocab} rows, as many as params, got {vocab}")
    expect("slots", slots, (rows,), torch.int64)
    expect("positions", positions, (rows,), torch.int64)
