"""Logprobs on the GPU: one sweep of the logits for everything, then one program a row.

    tile   row x tile   the chosen logit; maximum, sum of exp relative to it, number of logits above
                        the chosen one, and the tile's num_top best tokens as sortable keys
    row    row          combines the tiles, and picks the best of their best tokens

`logprobs.py` defines the raw ones, `processed_logprobs.py` the processed: their sweep redoes the
edits and tests each token against what the sampler has kept. A tile is 4096 tokens whatever the
batch, so a row's result does not depend on its neighbours. The sum of exp is a float32 sum in a
fixed order: it may differ from the reference in the last places, never with the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.edits_triton import scaled_logits, temperature_factors
from millrace.kernels.logprobs import RawLogprobs, check_logprob_inputs
from millrace.kernels.order_triton import key_id, key_of, key_value, load_kept, survives
from millrace.kernels.rng import TILE
from millrace.kernels.sampling import SampledTokens, check_inputs
from millrace.kernels.slot_sampling import SlotSampling

WARPS = 8

_TILE = tl.constexpr(TILE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _score_tile(
    x, o_vocab, m_vocab, chosen, o_out, p_best, p_sum, p_above, p_keys, p_chosen, num_top
):
    """What a tile knows of its logits x, -inf where masked."""
    best = tl.max(x, axis=0)
    tl.store(p_chosen + o_out, chosen)
    tl.store(p_sum + o_out, tl.sum(tl.exp(x - tl.maximum(best, _LOWEST)), axis=0))
    tl.store(p_above + o_out, tl.sum((x > chosen).to(tl.int32), axis=0))
    has_nan = tl.max((x != x).to(tl.int32), axis=0) != 0
    tl.store(p_best + o_out, tl.where(has_nan, float("nan"), best))
    keys = tl.where(m_vocab, key_of(x, o_vocab), -1)
    for i_top in range(num_top):
        top_key = tl.max(keys, axis=0)
        tl.store(p_keys + o_out * num_top + i_top, top_key)
        keys = tl.where(keys == top_key, -1, keys)


@triton.jit
def raw_tile_kernel(
    p_logits,
    p_token_ids,
    p_best,  # f32[R, tiles], NaN if the tile holds one
    p_sum,  # f32[R, tiles]
    p_above,  # i32[R, tiles]
    p_keys,  # i64[R, tiles, num_top], best first; -1 where the tile has no more
    p_chosen,  # f32[R, tiles], the same in all tiles
    stride_logits,
    tiles,
    vocab,
    num_top,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_logits + i_row * stride_logits
    o_vocab = i_tile * _TILE + tl.arange(0, _TILE)
    m_vocab = o_vocab < vocab
    x = tl.load(p_row + o_vocab, mask=m_vocab, other=float("-inf")).to(tl.float32)
    chosen = tl.load(p_row + tl.load(p_token_ids + i_row)).to(tl.float32)
    o_out = i_row * tiles + i_tile
    _score_tile(
        x, o_vocab, m_vocab, chosen, o_out, p_best, p_sum, p_above, p_keys, p_chosen, num_top
    )


@triton.jit
def _processed(row, kept, after, o_vocab, m_vocab):
    """Logits as the draw sees them."""
    x = scaled_logits(row, o_vocab, m_vocab)
    return tl.where(survives(key_of(x, o_vocab), x, kept), x * after, float("-inf"))


@triton.jit
def processed_tile_kernel(
    p_logits,
    p_slots,
    p_positions,
    p_scalars,
    p_bias,
    p_has_bias,
    p_seen,
    p_counts,
    p_has_penalties,
    p_stop_ids,
    p_min_position,
    p_kept,
    p_token_ids,
    p_best,
    p_sum,
    p_above,
    p_keys,
    p_chosen,
    stride_logits,
    tiles,
    vocab,
    num_top,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = tl.load(p_slots + i_row), tl.load(p_positions + i_row)
    tables = (p_bias, p_has_bias, p_seen, p_counts, p_has_penalties, p_stop_ids, p_min_position)
    row = (p_logits + i_row * stride_logits, slot, position, vocab, p_scalars, tables)
    kept = load_kept(p_kept + i_row * 4)
    _, _, after = temperature_factors(p_scalars, slot)
    o_vocab = i_tile * _TILE + tl.arange(0, _TILE)
    m_vocab = o_vocab < vocab
    x = _processed(row, kept, after, o_vocab, m_vocab)
    o_chosen = tl.arange(0, 1) + tl.load(p_token_ids + i_row).to(tl.int32)
    chosen = tl.max(_processed(row, kept, after, o_chosen, o_chosen < vocab), axis=0)
    o_out = i_row * tiles + i_tile
    _score_tile(
        x, o_vocab, m_vocab, chosen, o_out, p_best, p_sum, p_above, p_keys, p_chosen, num_top
    )


@triton.jit
def logprob_row_kernel(
    p_best,
    p_sum,
    p_above,
    p_keys,
    p_chosen,
    p_logprobs,  # f32[R]
    p_ranks,  # i64[R]
    p_top_ids,  # i64[R, num_top]
    p_top_logprobs,  # f32[R, num_top]
    tiles,
    num_top,
    TILES: tl.constexpr,  # tiles rounded up to a power of two
    KEYS: tl.constexpr,  # tiles * num_top, likewise
):
    i_row = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tiles
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
    best = tl.max(bests, axis=0)
    ordinary = tl.max(((bests != bests) | (bests == float("inf"))).to(tl.int32), axis=0) == 0
    best = tl.where(ordinary & (best > float("-inf")), best, float("nan"))
    sums = tl.load(p_sum + i_row * tiles + o_tile, mask=m_tile, other=0.0)
    log_sum = tl.log(tl.sum(sums * tl.exp(tl.maximum(bests, _LOWEST) - best), axis=0))
    chosen = tl.load(p_chosen + i_row * tiles)
    tl.store(p_logprobs + i_row, chosen - best - log_sum)
    above = tl.load(p_above + i_row * tiles + o_tile, mask=m_tile, other=0)
    tl.store(p_ranks + i_row, tl.sum(above, axis=0).to(tl.int64) + 1)
    o_key = tl.arange(0, KEYS)
    m_key = o_key < tiles * num_top
    keys = tl.load(p_keys + i_row * tiles * num_top + o_key, mask=m_key, other=-1)
    for i_top in range(num_top):
        top_key = tl.max(keys, axis=0)
        tl.store(p_top_ids + i_row * num_top + i_top, key_id(top_key).to(tl.int64))
        tl.store(p_top_logprobs + i_row * num_top + i_top, key_value(top_key) - best - log_sum)
        keys = tl.where(keys == top_key, -1, keys)


def raw_logprobs_triton(logits: Tensor, token_ids: Tensor, num_top: int) -> RawLogprobs:
    """As `raw_logprobs_reference`; never waits for the device. The last stride must be 1."""
    check_logprob_inputs(logits, token_ids, num_top)
    partial = _partial(logits, num_top)
    (rows, vocab), tiles = logits.shape, triton.cdiv(logits.shape[1], TILE)
    if rows:
        raw_tile_kernel[(rows, tiles)](
            *(logits, token_ids, *partial, logits.stride(0), tiles, vocab, num_top),
            num_warps=WARPS,
        )
    return _finish(partial, num_top)


def processed_logprobs_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    """As `processed_logprobs_reference`, of what `sample_triton` has sampled."""
    check_inputs(logits, slots, positions, params)
    check_logprob_inputs(logits, sampled.token_ids, num_top)
    if sampled.kept is None:
        raise ValueError("sampled: expected what sample_triton returns, got no `kept`")
    partial = _partial(logits, num_top)
    (rows, vocab), tiles = logits.shape, triton.cdiv(logits.shape[1], TILE)
    p = params
    if rows:
        processed_tile_kernel[(rows, tiles)](
            *(logits, slots, positions, p.scalars, p.bias, p.has_bias, p.prompt_seen),
            *(p.output_counts, p.has_penalties, p.stop_ids, p.min_position),
            *(sampled.kept, sampled.token_ids, *partial),
            *(logits.stride(0), tiles, vocab, num_top),
            num_warps=WARPS,
            enable_fp_fusion=False,  # the sampler's bits
        )
    return _finish(partial, num_top)


def _partial(logits: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """What the tiles leave for the rows: best, sum, above, keys, chosen."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected a last stride of 1, got {logits.stride(1)}")
    rows, tiles = logits.shape[0], triton.cdiv(logits.shape[1], TILE)

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, tiles, *shape, dtype=dtype, device=logits.device)

    keys = of(torch.int64, num_top)
    return of(torch.float32), of(torch.float32), of(torch.int32), keys, of(torch.float32)


def _finish(partial: tuple[Tensor, ...], num_top: int) -> RawLogprobs:
    (rows, tiles), device = partial[0].shape, partial[0].device
    scored = RawLogprobs(
        logprobs=torch.empty(rows, device=device),
        ranks=torch.empty(rows, dtype=torch.int64, device=device),
        top_ids=torch.empty(rows, num_top, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(rows, num_top, device=device),
    )
    if rows:
        logprob_row_kernel[(rows,)](
            *(*partial, scored.logprobs, scored.ranks, scored.top_ids, scored.top_logprobs),
            *(tiles, num_top, triton.next_power_of_2(tiles)),
            triton.next_power_of_2(max(1, tiles * num_top)),
            num_warps=WARPS,
        )
    return scored
