"""Filters of the last rows on the GPU: thousands of equal logits at a cut, which bins cannot part.

One program a row; only rows that `sampling_flat_triton.py` has given up on stay. Slow, exact, and
rare: a cut is found by halving the interval of keys that holds it, at most 52 sweeps of the row,
typical-p's radius bit by bit in 31.

What survives is always of one form: keys from `low` to `high`, as near to the expected logit as
`near` (typical-p). Filters move these three; the draw and later filters test against them.
"""

import torch
import triton
import triton.language as tl

from millrace.kernels.configs import UNFUSED
from millrace.kernels.edits_triton import NO_XTC, filters_of, scaled_logits, temperature_factors
from millrace.kernels.order_triton import (
    NO_ID,
    key_id,
    key_of,
    key_value,
    lowest_key,
    store_kept,
    survives,
)
from millrace.kernels.rng_triton import gumbel_at
from millrace.kernels.rows_triton import row_at
from millrace.kernels.sampling_filters_triton import (
    KEY_ROOM,
    expected_logit,
    mass_of,
    share_of,
    uses_row_mass,
    weighted_distance,
)

EXHAUST_OPTIONS = {"num_warps": 16, **UNFUSED}
SWEEP = 4096
"""Tokens of a sweep's step."""

_SWEEP = tl.constexpr(SWEEP)
_KEY_ROOM = tl.constexpr(KEY_ROOM)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _load(row, start, kept):
    """A tile from `start` on: (logits, keys, whether they survive), each [SWEEP]."""
    o_vocab = start + tl.arange(0, _SWEEP)
    x = scaled_logits(row, o_vocab, o_vocab < row.of.vocab)
    keys = key_of(x, o_vocab)
    return x, keys, survives(keys, x, kept)


@triton.jit
def _survey(row, kept, best):
    """Of the survivors: (their mass, the sum of their `weighted_distance`, the greatest key)."""
    mass, distance, greatest = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), kept[0]
    for start in range(0, row.of.vocab, _SWEEP):
        x, keys, m_kept = _load(row, start, kept)
        mass += tl.sum(tl.where(m_kept, mass_of(x, best), 0), axis=0)
        distance += tl.sum(tl.where(m_kept, weighted_distance(x, best), 0), axis=0)
        greatest = tl.maximum(greatest, tl.max(tl.where(m_kept, keys, 0), axis=0))
    return mass, distance, greatest


@triton.jit
def _last_heavy_key(row, kept, best, goal):
    """The least key of a survivor that weighs `goal` or more; `high` if there is none."""
    last = kept[1]
    for start in range(0, row.of.vocab, _SWEEP):
        x, keys, m_kept = _load(row, start, kept)
        m_heavy = m_kept & (mass_of(x, best) >= goal)
        last = tl.minimum(last, tl.min(tl.where(m_heavy, keys, kept[1]), axis=0))
    return last


@triton.jit
def _cut(row, kept, best, goal, by_count):
    """The greatest key at or above which the survivors weigh `goal`; `low` if all together weigh
    less. A token weighs 1 if `by_count`, else its mass."""
    low, high = kept[0], kept[1] + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        weight = tl.full((), 0, tl.int64)
        for start in range(0, row.of.vocab, _SWEEP):
            x, keys, m_kept = _load(row, start, kept)
            weights = tl.where(by_count, 1, mass_of(x, best))
            weight += tl.sum(tl.where(m_kept & (keys >= middle), weights, 0), axis=0)
        reached = weight >= goal
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return low


@triton.jit
def _radius(row, low, high, expected, best, goal):
    """The `near` of the closest tokens to `expected` from `low` to `high` that weigh the goal."""
    near = tl.zeros((), tl.int64)
    for i_bit in range(31):
        trial = near | (tl.full((), 1, tl.int64) << (30 - i_bit))
        weight = tl.full((), 0, tl.int64)
        for start in range(0, row.of.vocab, _SWEEP):
            x, _keys, m_kept = _load(row, start, (low, high, trial, expected))
            weight += tl.sum(tl.where(m_kept, mass_of(x, best), 0), axis=0)
        near = tl.where(weight >= goal, trial, near)
    return near


@triton.jit
def _draw(row, kept):
    """The survivor of the best score."""
    _, _, after = temperature_factors(row)
    top_score = tl.full((), float("-inf"), tl.float32)
    top_id = tl.full((), NO_ID, tl.int32)
    for start in range(0, row.of.vocab, _SWEEP):
        x, keys, m_kept = _load(row, start, kept)
        noise = gumbel_at(row.seed, row.position, key_id(keys))
        score = tl.where(m_kept, x * after + noise, float("-inf"))
        best_score = tl.max(score, axis=0)
        best_id = tl.min(tl.where(m_kept & (score == best_score), key_id(keys), NO_ID), axis=0)
        better = best_score > top_score  # ids ascend from sweep to sweep: first wins
        top_id = tl.where(better, best_id, top_id)
        top_score = tl.where(better, best_score, top_score)
    return top_id.to(tl.int64)


@triton.jit
def exhaust_kernel(
    rows,
    p_bound,
    p_total,
    p_count,  # i32[R], above KEY_ROOM of the rows that are left
    p_flat,
    p_span,
    p_token_ids,
    p_kept,
):
    i_row, count = tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    if tl.program_id(0) < tl.load(p_flat):
        i_row = tl.load(p_flat + 1 + tl.program_id(0)).to(tl.int64)
        count = tl.load(p_count + i_row)
    if count > _KEY_ROOM:
        best = tl.load(p_span + i_row * 2)
        row = row_at(rows, i_row)
        top_k, typical_p, top_p, min_p, xtc = filters_of(row)
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
                by_row_mass = (i_filter == 2) & uses_row_mass(row)
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
        tl.store(p_token_ids + i_row, _draw(row, (low, high, near, expected)))
        store_kept(p_kept + i_row * 4, (low, high, near, expected))
