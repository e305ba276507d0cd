"""Filters on the GPU: top-k, top-p and min-p of a row, and its draw, without a sort.

`sampling_triton.py` tells the four kernels' places. They read what its first kernel left for the
rows with filters: scaled logits, group maxima, masses. Other rows leave at once.
"""

import torch
import triton
import triton.language as tl

from millrace.kernels.logprobs import MASS_ONE
from millrace.kernels.order_triton import (
    KEY_BITS,
    NO_ID,
    SIGN,
    key_id,
    key_of,
    key_value,
    order_of,
    value_of,
)
from millrace.kernels.rng import TILE
from millrace.kernels.rng_triton import gumbel_at
from millrace.kernels.sampling import GREEDY_BELOW

GROUP = 32
GROUPS_PER_TILE = TILE // GROUP
CAPACITY = 1024
"""Candidates that `finish` holds in registers."""

_TILE = tl.constexpr(TILE)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_CAPACITY = tl.constexpr(CAPACITY)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_MASS_ONE = tl.constexpr(MASS_ONE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_BOUND_SLACK = tl.constexpr(1e-3)  # lowers a bound made with exp and log by more than they round


@triton.jit
def filters(slot, p_temperature, p_top_k, p_top_p, p_min_p):
    """(top_k, top_p, min_p, whether the row samples through any of them)."""
    top_k, top_p = tl.load(p_top_k + slot), tl.load(p_top_p + slot)
    min_p = tl.load(p_min_p + slot)
    samples = tl.load(p_temperature + slot) >= _GREEDY_BELOW
    return top_k, top_p, min_p, samples & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def mass_of(x, best):
    """floor(exp(x - best) * 2^40) as int64."""
    return (tl.exp(x - best) * _MASS_ONE).to(tl.int64)


@triton.jit
def _top_p_target(top_p, total):
    target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(target, total), 1)


@triton.jit
def _head(keys, weights, goal, BITS: tl.constexpr):
    """The greatest bound below 2^BITS at or above which keys >= 0 weigh `goal` or more; else 0."""
    bound = tl.zeros((), tl.int64)
    for i_bit in range(BITS):
        trial = bound | (tl.full((), 1, tl.int64) << (BITS - 1 - i_bit))
        weight = tl.sum(tl.where(keys >= trial, weights, 0), axis=0)
        bound = tl.where(weight >= goal, trial, bound)
    return bound


@triton.jit
def bound_kernel(
    p_slots,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_maxima,
    p_mass,
    p_best,
    p_bound,  # f32[R]
    p_total,  # i64[R], the row's mass
    p_count,  # i32[R], set to 0
    tiles,
    vocab,
    TILES: tl.constexpr,  # tiles, rounded up to a power of two
):
    i_row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    top_k, top_p, min_p, filtered = filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
    tl.store(p_count + i_row, 0)
    if filtered:
        o_tile, o_group = tl.arange(0, TILES), tl.arange(0, TILES * _GROUPS)
        m_tile, m_group = o_tile < tiles, o_group < tiles * _GROUPS
        bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
        best = tl.maximum(tl.max(bests, axis=0), _LOWEST)
        masses = tl.load(p_mass + i_row * tiles + o_tile, mask=m_tile, other=0)
        # Masses are relative to each tile's maximum; in double the change of base is exact enough.
        share = tl.exp(tl.maximum(bests, _LOWEST).to(tl.float64) - best.to(tl.float64))
        total = tl.sum((masses.to(tl.float64) * share).to(tl.int64), axis=0)
        maxima = tl.load(
            p_maxima + i_row * tiles * _GROUPS + o_group, mask=m_group, other=float("-inf")
        )
        # The greatest bound at or above which the maxima alone are k, or weigh top-p's target.
        by_count = top_k > 0
        goal = tl.where(by_count, top_k.to(tl.int64), _top_p_target(top_p, total))
        weight = tl.where(by_count, tl.full((), 1, tl.int64), mass_of(maxima, best))
        keys = order_of(maxima).to(tl.int64) + SIGN
        found = _head(keys, weight, goal, 32)
        bound = tl.where(found > 0, value_of((found - SIGN).to(tl.int32)), float("-inf"))
        # Should all maxima together weigh too little for top-p: tokens lighter than 1/V of what may
        # be left out cannot together weigh more than that.
        spare = (total - goal).to(tl.float64) / _MASS_ONE / vocab
        light = best + tl.log(tl.maximum(spare, 1e-300)).to(tl.float32) - _BOUND_SLACK
        bound = tl.where((found == 0) & ~by_count, light, bound)
        bound = tl.where(by_count | (top_p < 1), bound, float("-inf"))
        # Where top-k and top-p both cut, top-p needs all of top-k's mass: min-p must wait.
        lowest = tl.where(by_count & (top_p < 1), float("-inf"), best + tl.log(min_p))
        bound = tl.maximum(bound, lowest)
        tl.store(p_bound + i_row, tl.maximum(bound, _LOWEST))
        tl.store(p_total + i_row, total)


@triton.jit
def gather_kernel(
    p_slots,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_scaled,
    p_best,
    p_bound,
    p_count,  # i32[R], how many tokens reach the bound
    p_keys,  # i64[R, CAPACITY], those that fit, in no order
    tiles,
    vocab,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, _, filtered = filters(tl.load(p_slots + i_row), p_temperature, p_top_k, p_top_p, p_min_p)
    bound = tl.load(p_bound + i_row)
    if filtered & (tl.load(p_best + i_row * tiles + i_tile) >= bound):
        o_vocab = i_tile * _TILE + tl.arange(0, _TILE)
        x = tl.load(p_scaled + i_row * vocab + o_vocab, mask=o_vocab < vocab, other=float("-inf"))
        m_kept = x >= bound
        kept = m_kept.to(tl.int32)
        start = tl.atomic_add(p_count + i_row, tl.sum(kept, axis=0))
        o_key = start + tl.cumsum(kept, axis=0) - 1
        m_kept = m_kept & (o_key < _CAPACITY)
        tl.store(p_keys + i_row * _CAPACITY + o_key, key_of(x, o_vocab), mask=m_kept)


@triton.jit
def finish_kernel(
    p_slots,
    p_positions,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_seed,
    p_best,
    p_best_id,
    p_total,
    p_count,
    p_keys,
    p_token_ids,  # i64[R]
    p_ok,  # bool[R]
    tiles,
    TILES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tiles
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
    ids = tl.load(p_best_id + i_row * tiles + o_tile, mask=m_tile, other=NO_ID)
    best = tl.max(bests, axis=0)
    token_id = tl.min(tl.where(bests == best, ids, NO_ID), axis=0)
    ok = (best > float("-inf")) & (tl.max((bests != bests).to(tl.int32), axis=0) == 0)
    tl.store(p_ok + i_row, ok)
    tl.store(p_token_ids + i_row, tl.where(ok, token_id, 0))
    top_k, top_p, min_p, filtered = filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
    if filtered & ok & (best < float("inf")):
        count = tl.load(p_count + i_row)
        if count <= _CAPACITY:
            o_key = tl.arange(0, _CAPACITY)
            keys = tl.load(p_keys + i_row * _CAPACITY + o_key, mask=o_key < count, other=0)
            m_kept = o_key < count
            if top_k > 0:
                m_kept = m_kept & (keys >= _head(keys, m_kept.to(tl.int64), top_k, KEY_BITS))
            x = tl.where(m_kept, key_value(keys), float("-inf"))
            if top_p < 1:
                masses = mass_of(x, best)
                total = tl.sum(masses, axis=0)
                if top_k == 0:
                    total = tl.load(p_total + i_row)
                target = _top_p_target(top_p, total)
                m_kept = m_kept & (keys >= _head(keys, masses, target, KEY_BITS))
            m_kept = m_kept & (x >= best + tl.log(min_p))
            kept_ids = key_id(keys)
            seed, position = tl.load(p_seed + slot), tl.load(p_positions + i_row)
            score = tl.where(m_kept, x + gumbel_at(seed, position, kept_ids), float("-inf"))
            winners = tl.where(score == tl.max(score, axis=0), kept_ids, NO_ID)
            tl.store(p_token_ids + i_row, tl.min(winners, axis=0).to(tl.int64))


@triton.jit
def _cut(p_row, vocab, best, goal, COUNT: tl.constexpr):
    """The shortest head of a row whose weight reaches `goal`, as (the order of its last token,
    how many tokens of that order belong to it). A token weighs 1 if COUNT, else its mass.

    The greatest order at or above which the weight reaches the goal is found bit by bit.
    """
    found = tl.zeros((), tl.int64)
    for i_bit in range(32):
        trial = found | (tl.full((), 1, tl.int64) << (31 - i_bit))
        weight = _weight_from(p_row, vocab, best, (trial - SIGN).to(tl.int32), COUNT)
        found = tl.where(weight >= goal, trial, found)
    order = (found - SIGN).to(tl.int32)
    above = _weight_from(p_row, vocab, best, order + 1, COUNT)
    each = tl.full((), 1, tl.int64)
    if not COUNT:
        each = tl.maximum(mass_of(value_of(order), best), 1)
    return order, (goal - above + each - 1) // each


@triton.jit
def _weight_from(p_row, vocab, best, order, COUNT: tl.constexpr):
    """Weight of a row's tokens whose order is at least `order`."""
    weight = tl.zeros((_TILE,), tl.int64)
    for start in range(0, vocab, _TILE):
        o_vocab = start + tl.arange(0, _TILE)
        x = tl.load(p_row + o_vocab, mask=o_vocab < vocab, other=float("-inf"))
        each = (x > float("-inf")).to(tl.int64)
        if not COUNT:
            each = mass_of(x, best)
        weight += tl.where(order_of(x) >= order, each, 0)
    return tl.sum(weight, axis=0)


@triton.jit
def wide_kernel(
    p_slots,
    p_positions,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_seed,
    p_scaled,
    p_best,
    p_count,
    p_token_ids,
    p_ok,
    tiles,
    vocab,
    TILES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    top_k, top_p, min_p, filtered = filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
    o_tile = tl.arange(0, TILES)
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=o_tile < tiles, other=float("-inf"))
    best = tl.max(bests, axis=0)
    wide = tl.load(p_count + i_row) > _CAPACITY
    if filtered & wide & tl.load(p_ok + i_row) & (best < float("inf")):
        p_row = p_scaled + i_row * vocab
        # The cut: all tokens above `order`, and of those equal to it the first `equals`.
        everything = order_of(tl.full((), _LOWEST, tl.float32)) - 1
        order, equals = everything, tl.zeros((), tl.int64)
        if top_k > 0:
            finite = _weight_from(p_row, vocab, best, everything, True)
            order, equals = _cut(p_row, vocab, best, tl.minimum(finite, top_k), True)
        if top_p < 1:
            total = _weight_from(p_row, vocab, best, order + 1, False)
            total += equals * mass_of(value_of(order), best)
            goal = _top_p_target(top_p, total)
            order, equals = _cut(p_row, vocab, best, goal, False)
        seed, position = tl.load(p_seed + slot), tl.load(p_positions + i_row)
        lowest = tl.maximum(best + tl.log(min_p), _LOWEST)
        top_score = tl.full((), float("-inf"), tl.float32)
        top_id = tl.full((), NO_ID, tl.int32)
        for start in range(0, vocab, _TILE):
            o_vocab = start + tl.arange(0, _TILE)
            x = tl.load(p_row + o_vocab, mask=o_vocab < vocab, other=float("-inf"))
            m_equal = order_of(x) == order
            rank = tl.cumsum(m_equal.to(tl.int64), axis=0)
            m_kept = (x >= lowest) & ((order_of(x) > order) | (m_equal & (rank <= equals)))
            equals -= tl.sum(m_equal.to(tl.int64), axis=0)
            score = tl.where(m_kept, x + gumbel_at(seed, position, o_vocab), float("-inf"))
            best_score = tl.max(score, axis=0)
            best_id = tl.min(tl.where(score == best_score, o_vocab, NO_ID), axis=0)
            better = best_score > top_score  # ids ascend from tile to tile: first wins
            top_id = tl.where(better, best_id, top_id)
            top_score = tl.where(better, best_score, top_score)
        tl.store(p_token_ids + i_row, top_id.to(tl.int64))
