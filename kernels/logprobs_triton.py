"""Raw logprobs on the GPU: one sweep of the logits for everything, then one program a row.

    tile   row x tile   maximum, sum of exp relative to it, number of logits above the chosen
                        one's, and the tile's num_top best tokens as sortable keys
    row    row          combines the tiles, and picks the best of their best tokens

`logprobs.py` has the definition. A tile is 4096 tokens whatever the batch, so a row's result does
not depend on its neighbours. The sum of exp is a float32 sum in a fixed order: it may differ from
the reference in the last places, never with the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.logprobs import RawLogprobs, check_logprob_inputs
from millrace.kernels.order_triton import key_id, key_of, key_value
from millrace.kernels.rng import TILE

WARPS = 8

_TILE = tl.constexpr(TILE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def logprob_tile_kernel(
    p_logits,
    p_token_ids,
    p_best,  # f32[R, tiles], NaN if the tile holds one
    p_sum,  # f32[R, tiles]
    p_above,  # i32[R, tiles]
    p_keys,  # i64[R, tiles, num_top], best first; -1 where the tile has no more
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
    best = tl.max(x, axis=0)
    o_out = i_row * tiles + i_tile
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
def logprob_row_kernel(
    p_logits,
    p_token_ids,
    p_best,
    p_sum,
    p_above,
    p_keys,
    p_logprobs,  # f32[R]
    p_ranks,  # i64[R]
    p_top_ids,  # i64[R, num_top]
    p_top_logprobs,  # f32[R, num_top]
    stride_logits,
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
    token_id = tl.load(p_token_ids + i_row)
    chosen = tl.load(p_logits + i_row * stride_logits + token_id).to(tl.float32)
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
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected a last stride of 1, got {logits.stride(1)}")
    (rows, vocab), device = logits.shape, logits.device
    tiles = triton.cdiv(vocab, TILE)
    raw = RawLogprobs(
        logprobs=torch.empty(rows, device=device),
        ranks=torch.empty(rows, dtype=torch.int64, device=device),
        top_ids=torch.empty(rows, num_top, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(rows, num_top, device=device),
    )
    if not rows:
        return raw
    best = torch.empty(rows, tiles, device=device)
    sums = torch.empty_like(best)
    above = torch.empty(rows, tiles, dtype=torch.int32, device=device)
    keys = torch.empty(rows, tiles, num_top, dtype=torch.int64, device=device)
    partial = (best, sums, above, keys)
    logprob_tile_kernel[(rows, tiles)](
        *(logits, token_ids, *partial, logits.stride(0), tiles, vocab, num_top), num_warps=WARPS
    )
    logprob_row_kernel[(rows,)](
        *(logits, token_ids, *partial, raw.logprobs, raw.ranks, raw.top_ids, raw.top_logprobs),
        *(logits.stride(0), tiles, num_top),
        *(triton.next_power_of_2(tiles), triton.next_power_of_2(max(1, tiles * num_top))),
        num_warps=WARPS,
    )
    return raw
