"""Filters of flat rows on the GPU: more candidates than fit a list, so the cuts are found by sweeps
over the logits themselves. One program a row; rows that have their token already leave at once.

What survives is always of one form: keys from `low` to `high`, as near to the expected logit as
`near` (typical-p). Filters move these three; the draw and later filters test against them.

A cut (top-k, top-p) is the greatest key at or above which the survivors weigh the goal; it lies in
[low, high). A sweep narrows that interval to a few of 1024 equal bins of keys:

    counts     survivors in each bin, by a histogram
    bounds     in a bin of keys from a to b each token weighs between mass(a) and mass(b), so the
               counts bound the weight at or above each bin's edge from both sides: exactly when
               only counting, or when all keys of a bin share their value
    pivot      the exact weight at or above the middle bin's edge, so that even a bin too wide for
               its bounds to tell halves the interval

Example: top-p 0.9 of 131072 normal logits of deviation 2.5, of which 49598 reach the bound. After
one sweep the cut is known to lie in 32 bins that hold 2517 of them, after two in one bin of 4, and
after three at one token. Where the interval spans zero (floats crowd there) or many values tie, it
takes up to 6; the last of these order ties by id.

typical-p's radius has no such bounds, since a distance stands for two logits: 31 sweeps find it bit
by bit.
"""

import torch
import triton
import triton.language as tl

from millrace.kernels.edits_triton import (
    MIN_P,
    NO_XTC,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    is_filtered,
    scalar,
    scaled_logits,
    temperature_factors,
    xtc_threshold,
)
from millrace.kernels.order_triton import (
    KEY_BITS,
    NO_ID,
    key_of,
    key_value,
    lowest_key,
    store_kept,
    survives,
)
from millrace.kernels.rng import CALLS_PER_TILE, TILE
from millrace.kernels.rng_triton import gumbel_tile
from millrace.kernels.sampling_filters_triton import (
    CAPACITY,
    expected_logit,
    mass_of,
    share_of,
    uses_row_mass,
    weighted_distance,
)

BINS = 1024
SWEEP = 2048
"""Tokens of a sweep's step; the draw steps by the noise's tiles of 4096."""

_BINS = tl.constexpr(BINS)
_BIN_BITS = tl.constexpr(BINS.bit_length() - 1)
_SWEEP = tl.constexpr(SWEEP)
_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_CAPACITY = tl.constexpr(CAPACITY)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _load(row, start, kept):
    """A tile from `start` on: (logits, keys, whether they survive), each [SWEEP]."""
    o_vocab = start + tl.arange(0, _SWEEP)
    x = scaled_logits(row, o_vocab, o_vocab < row[3])
    keys = key_of(x, o_vocab)
    return x, keys, survives(keys, x, kept)


@triton.jit
def _survey(row, kept, best):
    """Of the survivors: (their mass, the sum of their `weighted_distance`, the greatest key)."""
    mass, distance, greatest = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), kept[0]
    for start in range(0, row[3], _SWEEP):
        x, keys, m_kept = _load(row, start, kept)
        mass += tl.sum(tl.where(m_kept, mass_of(x, best), 0), axis=0)
        distance += tl.sum(tl.where(m_kept, weighted_distance(x, best), 0), axis=0)
        greatest = tl.maximum(greatest, tl.max(tl.where(m_kept, keys, 0), axis=0))
    return mass, distance, greatest


@triton.jit
def _last_heavy_key(row, kept, best, goal):
    """The least key of a survivor that weighs `goal` or more; `high` if there is none."""
    last = kept[1]
    for start in range(0, row[3], _SWEEP):
        x, keys, m_kept = _load(row, start, kept)
        m_heavy = m_kept & (mass_of(x, best) >= goal)
        last = tl.minimum(last, tl.min(tl.where(m_heavy, keys, kept[1]), axis=0))
    return last


@triton.jit
def _cut(row, kept, best, goal, by_count):
    """The greatest key at or above which the survivors weigh `goal`, or one that keeps the same of
    them; `low` if all together weigh less. A token weighs 1 if `by_count`, else its mass."""
    low, high = kept[0], kept[1] + 1
    inside = tl.full((), _BINS, tl.int64)
    o_bin = tl.arange(0, _BINS)
    while (high - low > 1) & (inside > 1):
        shift = tl.zeros((), tl.int64)  # the least with BINS << shift >= high - low
        for i_bit in range(KEY_BITS - _BIN_BITS):
            shift += (((high - low - 1) >> (_BIN_BITS + i_bit)) > 0).to(tl.int64)
        middle = high - ((tl.full((), _BINS // 2, tl.int64)) << shift)
        counts = tl.zeros((_BINS,), tl.int32)
        above, from_middle = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        for start in range(0, row[3], _SWEEP):
            x, keys, m_kept = _load(row, start, kept)
            weights = tl.where(m_kept, tl.where(by_count, 1, mass_of(x, best)), 0)
            above += tl.sum(tl.where(keys >= high, weights, 0), axis=0)
            from_middle += tl.sum(tl.where(keys >= middle, weights, 0), axis=0)
            m_inside = m_kept & (keys >= low) & (keys < high)
            bins = tl.where(m_inside, (high - 1 - keys) >> shift, 0).to(tl.int32)
            counts += tl.histogram(bins, _BINS, mask=m_inside)
        # Bin 0 holds the best keys. Bins before `first` end short of the goal at the most that
        # their tokens can weigh, those before `last` at the least.
        top = high - 1 - (o_bin.to(tl.int64) << shift)
        bottom = tl.maximum(top + 1 - (tl.full((), 1, tl.int64) << shift), low)
        heaviest = tl.where(by_count, 1, mass_of(key_value(tl.maximum(top, low)), best))
        lightest = tl.where(by_count, 1, mass_of(key_value(bottom), best))
        missing = goal - above
        first = tl.sum((tl.cumsum(counts * heaviest, axis=0) < missing).to(tl.int32), axis=0)
        last = tl.sum((tl.cumsum(counts * lightest, axis=0) < missing).to(tl.int32), axis=0)
        reached = from_middle >= goal
        first = tl.where(reached, first, tl.maximum(first, _BINS // 2))
        last = tl.where(reached, tl.minimum(last, _BINS // 2 - 1), last)
        m_left = (o_bin >= first) & (o_bin <= last)
        inside = tl.sum(tl.where(m_left, counts, 0), axis=0).to(tl.int64)
        low = tl.maximum(low, high - ((last + 1).to(tl.int64) << shift))
        high = high - (first.to(tl.int64) << shift)
    return low


@triton.jit
def _radius(row, low, high, expected, best, goal):
    """The `near` of the closest tokens to `expected` from `low` to `high` that weigh the goal."""
    near = tl.zeros((), tl.int64)
    for i_bit in range(31):
        trial = near | (tl.full((), 1, tl.int64) << (30 - i_bit))
        weight = tl.full((), 0, tl.int64)
        for start in range(0, row[3], _SWEEP):
            x, _keys, m_kept = _load(row, start, (low, high, trial, expected))
            weight += tl.sum(tl.where(m_kept, mass_of(x, best), 0), axis=0)
        near = tl.where(weight >= goal, trial, near)
    return near


@triton.jit
def _draw(row, kept, seed, after):
    """The survivor of the best score, by a sweep in the order of the noise."""
    position, vocab = row[2], row[3]
    top_score = tl.full((), float("-inf"), tl.float32)
    top_id = tl.full((), NO_ID, tl.int32)
    o_tile = tl.arange(0, 4)[None, :] * _CALLS + tl.arange(0, _CALLS)[:, None]
    for start in range(0, vocab, _TILE):
        o_vocab = start + o_tile
        x = scaled_logits(row, o_vocab, o_vocab < vocab)
        m_kept = survives(key_of(x, o_vocab), x, kept)
        noise = gumbel_tile(seed, position, start // _TILE)
        score = tl.where(m_kept, x * after + noise, float("-inf"))
        best_score = tl.max(tl.max(score, axis=1), axis=0)
        winners = tl.where(m_kept & (score == best_score), o_vocab, NO_ID)
        best_id = tl.min(tl.min(winners, axis=1), axis=0)
        better = best_score > top_score  # ids ascend from tile to tile: first wins
        top_id = tl.where(better, best_id, top_id)
        top_score = tl.where(better, best_score, top_score)
    return top_id.to(tl.int64)


@triton.jit
def wide_kernel(
    p_logits,
    p_slots,
    p_positions,
    p_scalars,
    p_seed,
    p_bias,
    p_has_bias,
    p_seen,
    p_counts,
    p_has_penalties,
    p_stop_ids,
    p_min_position,
    p_best,
    p_floor,
    p_bound,
    p_total,
    p_count,
    p_token_ids,
    p_ok,
    p_kept,
    stride_logits,
    tiles,
    vocab,
    TILES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(p_slots + i_row), tl.load(p_positions + i_row)
    tables = (p_bias, p_has_bias, p_seen, p_counts, p_has_penalties, p_stop_ids, p_min_position)
    o_tile = tl.arange(0, TILES)
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=o_tile < tiles, other=float("-inf"))
    best = tl.max(bests, axis=0)
    wide = is_filtered(p_scalars, p_seed, slot, position) & (tl.load(p_count + i_row) > _CAPACITY)
    if wide & tl.load(p_ok + i_row) & (best < float("inf")):
        row = (p_logits + i_row * stride_logits, slot, position, vocab, p_scalars, tables)
        top_k, typical_p = scalar(p_scalars, slot, TOP_K), scalar(p_scalars, slot, TYPICAL_P)
        top_p, min_p = scalar(p_scalars, slot, TOP_P), scalar(p_scalars, slot, MIN_P)
        xtc = xtc_threshold(p_scalars, p_seed, slot, position)
        # What the bound leaves out no later filter needs; top-n-sigma's is part of it.
        low = lowest_key(tl.load(p_bound + i_row))
        high = lowest_key(best) + NO_ID
        near, expected = tl.zeros((), tl.int64), tl.zeros((), tl.float32)
        total, distance, greatest = tl.load(p_total + i_row), tl.zeros((), tl.int64), high
        for i_filter in range(5):  # a loop, so that each kind of sweep is compiled once
            is_on = ((i_filter == 0) & (top_k > 0)) | ((i_filter == 1) & (typical_p < 1))
            is_on |= ((i_filter == 2) & (top_p < 1)) | ((i_filter == 3) & (min_p > 0))
            if is_on | ((i_filter == 4) & (xtc < NO_XTC)):
                kept = (low, high, near, expected)
                by_row_mass = (i_filter == 2) & uses_row_mass(p_scalars, slot)
                if (i_filter > 0) & ~by_row_mass:
                    total, distance, greatest = _survey(row, kept, best)
                if (i_filter == 0) | (i_filter == 2):
                    by_count = i_filter == 0
                    goal = tl.where(by_count, top_k.to(tl.int64), share_of(top_p, total))
                    low = _cut(row, kept, best, goal, by_count)
                elif i_filter == 1:
                    expected = expected_logit(best, distance, total)
                    near = _radius(row, low, high, expected, best, share_of(typical_p, total))
                elif i_filter == 3:
                    lowest = tl.maximum(key_value(greatest) + tl.log(min_p), _LOWEST)
                    low = tl.maximum(low, lowest_key(lowest))
                else:
                    high = _last_heavy_key(row, kept, best, share_of(xtc, total))
        _, _, after = temperature_factors(p_scalars, slot)
        token_id = _draw(row, (low, high, near, expected), tl.load(p_seed + slot), after)
        tl.store(p_token_ids + i_row, token_id)
        store_kept(p_kept + i_row * 4, low, high, near, expected)
