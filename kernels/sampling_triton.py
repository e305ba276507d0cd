"""Sampling on the GPU: what `sampling.py` defines, in one sweep of the logits and a sparse second.

Five launches, none of which waits for the host, whatever the rows ask for:

    stats    row x tile   edits, temperature; the tile's best (score, id). For a row with filters
                          also its scaled logits, the maxima of groups of 32 and its mass
    bound    row          a value below which no token can survive the filters, from the maxima
    gather   row x tile   (value, id) of every token that reaches the bound, as one sortable key;
                          most tiles see from their maximum alone that they hold none
    finish   row          no filter: the best of the tiles. Filters: sort the keys, cut, draw
    wide     row          filters that keep more than CAPACITY candidates: search the cut bit by
                          bit over the row (some 70 sweeps by one program; flat rows only)

Rows leave a kernel that is not for them at once, so rows without filters pay for the first sweep
only. A tile is 4096 tokens of the vocabulary whatever the batch; tiles are combined by maxima and
by integer sums, noise is a function of (seed, position, id): nothing depends on R or on the row.

Against the reference: exp and log are the device's own, so a draw can differ where two scores, or
a mass and top-p's target, lie within a few units in the last place. -log1p(-u) is a polynomial for
u < 1/16 (truncation below 1e-8 of the result) and log(1 - u) above (rounding below 5e-7).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.logprobs_triton import raw_logprobs_triton
from millrace.kernels.rng import CALLS_PER_TILE, PURPOSE_DRAW, TILE
from millrace.kernels.sampling import (
    GREEDY_BELOW,
    SampledTokens,
    attach_logprobs,
    check_inputs,
)
from millrace.kernels.slot_sampling import MAX_STOP_IDS, SlotSampling

GROUP = 32
GROUPS_PER_TILE = TILE // GROUP
CAPACITY = 1024
"""Candidates that `finish` sorts in registers."""
MAX_VOCAB = 1 << 19
"""Group maxima of a row must fit the registers of one program."""

_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_STOPS = tl.constexpr(MAX_STOP_IDS)
_PURPOSE = tl.constexpr(PURPOSE_DRAW)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_MASS_ONE = tl.constexpr(float(1 << 40))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_ID = tl.constexpr(0x7FFFFFFF)
_SLACK = tl.constexpr(1e-3)


@triton.jit
def _gumbel(words):
    """uint32 words -> f32 noise, see rng.py."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    tail = u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6)))))
    exponential = tl.where(u < 0.0625, u + u * tail, -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _philox(seed, position, counters):
    zero = (counters * 0).to(tl.uint32)
    c1 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counters.to(tl.uint32), c1, zero + _PURPOSE, zero)


@triton.jit
def _gumbel_at(seed, position, ids):
    """Noise of arbitrary ids: i32 -> f32."""
    counters = (ids // _TILE) * _CALLS + ids % _CALLS
    w0, w1, w2, w3 = _philox(seed, position, counters)
    which = (ids // _CALLS) % 4
    low, high = tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)
    return _gumbel(tl.where(which < 2, low, high))


@triton.jit
def _gumbel_tile(seed, position, i_tile):
    """Noise of a tile, [CALLS, 4]: element (i, w) is that of id tile * 4096 + w * 1024 + i."""
    w0, w1, w2, w3 = _philox(seed, position, i_tile * _CALLS + tl.arange(0, _CALLS))
    return _gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (_CALLS, 4)))


@triton.jit
def _mass(x, best):
    """floor(exp(x - best) * 2^40) as int64."""
    return (tl.exp(x - best) * _MASS_ONE).to(tl.int64)


@triton.jit
def _order(x):
    """f32 -> i32 in the same order; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(order):
    """The f32 of `_order`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _top_p_target(top_p, total):
    target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(target, total), 1)


@triton.jit
def _filters(slot, p_temperature, p_top_k, p_top_p, p_min_p):
    """(top_k, top_p, min_p, whether the row samples through any of them)."""
    top_k, top_p = tl.load(p_top_k + slot), tl.load(p_top_p + slot)
    min_p = tl.load(p_min_p + slot)
    samples = tl.load(p_temperature + slot) >= _GREEDY_BELOW
    return top_k, top_p, min_p, samples & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _penalised(x, o_row, m_vocab, slot, p_repetition, p_presence, p_frequency, p_seen, p_counts):
    counts = tl.load(p_counts + o_row, mask=m_vocab, other=0)
    seen = tl.load(p_seen + o_row, mask=m_vocab, other=0).to(tl.int32)
    penalty = tl.load(p_repetition + slot)
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty)
    x = tl.where((counts > 0) | (seen != 0), repeated, x)
    said = tl.load(p_frequency + slot) * counts.to(tl.float32) + tl.load(p_presence + slot)
    return tl.where(counts > 0, x - said, x)


@triton.jit
def _stats_kernel(
    p_logits,
    p_slots,
    p_positions,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_repetition,
    p_presence,
    p_frequency,
    p_seed,
    p_bias,
    p_has_bias,
    p_seen,
    p_counts,
    p_has_penalties,
    p_stop_ids,
    p_min_position,
    p_scaled,  # f32[R, V], written for rows with filters
    p_maxima,  # f32[R, tiles * GROUPS], likewise
    p_mass,  # i64[R, tiles], relative to the tile's maximum, likewise
    p_best,  # f32[R, tiles], the tile's best score; NaN if it holds one
    p_best_id,  # i32[R, tiles]
    stride_logits,
    tiles,
    vocab,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = tl.load(p_slots + i_row), tl.load(p_positions + i_row)
    o_vocab = (  # [CALLS, 4], the order of the noise
        i_tile * _TILE + tl.arange(0, 4)[None, :] * _CALLS + tl.arange(0, _CALLS)[:, None]
    )
    m_vocab = o_vocab < vocab
    o_slot_row = slot * vocab + o_vocab
    x = tl.load(p_logits + i_row * stride_logits + o_vocab, mask=m_vocab, other=float("-inf"))
    x = x.to(tl.float32)
    if tl.load(p_has_bias + slot):
        x += tl.load(p_bias + o_slot_row, mask=m_vocab, other=0.0)
    if position < tl.load(p_min_position + slot):
        for i_stop in range(_STOPS):
            stop_id = tl.load(p_stop_ids + slot * _STOPS + i_stop)
            x = tl.where(o_vocab == stop_id, x + float("-inf"), x)
    if tl.load(p_has_penalties + slot):
        x = _penalised(
            x, o_slot_row, m_vocab, slot, p_repetition, p_presence, p_frequency, p_seen, p_counts
        )
    has_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    temperature = tl.load(p_temperature + slot)
    _, _, _, filtered = _filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
    score = x
    if temperature >= _GREEDY_BELOW:
        x *= tl.div_rn(1.0, temperature)
        score = x
        if filtered:
            tl.store(p_scaled + i_row * vocab + o_vocab, x, mask=m_vocab)
            lanes = tl.reshape(tl.max(x, axis=1), (_GROUPS, _CALLS // _GROUPS))
            groups = tl.max(lanes, axis=1)
            o_group = (i_row * tiles + i_tile) * _GROUPS + tl.arange(0, _GROUPS)
            tl.store(p_maxima + o_group, groups)
            best = tl.maximum(tl.max(groups, axis=0), _LOWEST)
            mass = tl.sum(tl.sum(_mass(x, best), axis=1), axis=0)
            tl.store(p_mass + i_row * tiles + i_tile, mass)
        else:
            score = x + _gumbel_tile(tl.load(p_seed + slot), position, i_tile)
    best = tl.max(tl.max(score, axis=1), axis=0)
    winners = tl.where(score == best, o_vocab, _NO_ID)
    tl.store(p_best_id + i_row * tiles + i_tile, tl.min(tl.min(winners, axis=1), axis=0))
    best = tl.where(has_nan != 0, float("nan"), best)
    tl.store(p_best + i_row * tiles + i_tile, best)


@triton.jit
def _bound_kernel(
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
    top_k, top_p, min_p, filtered = _filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
    if filtered:
        o_tile, o_group = tl.arange(0, TILES), tl.arange(0, TILES * _GROUPS)
        m_tile, m_group = o_tile < tiles, o_group < tiles * _GROUPS
        bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
        best = tl.maximum(tl.max(bests, axis=0), _LOWEST)
        mass = tl.load(p_mass + i_row * tiles + o_tile, mask=m_tile, other=0)
        # Masses were relative to each tile's maximum; double precision makes the change exact enough.
        share = tl.exp(tl.maximum(bests, _LOWEST).to(tl.float64) - best.to(tl.float64))
        total = tl.sum((mass.to(tl.float64) * share).to(tl.int64), axis=0)
        maxima = tl.load(
            p_maxima + i_row * tiles * _GROUPS + o_group, mask=m_group, other=float("-inf")
        )
        # The greatest bound at or above which the maxima alone are k, or weigh top-p's target.
        goal, weight = top_k.to(tl.int64), (maxima == maxima).to(tl.int64)
        if top_k == 0:
            goal, weight = _top_p_target(top_p, total), _mass(maxima, best)
        order = _order(maxima)
        found = tl.zeros((), tl.int64)
        for i_bit in range(32):
            trial = found | (tl.full((), 1, tl.int64) << (31 - i_bit))
            above = order >= (trial - 2147483648).to(tl.int32)
            found = tl.where(tl.sum(tl.where(above, weight, 0), axis=0) >= goal, trial, found)
        bound = tl.where(found > 0, _value((found - 2147483648).to(tl.int32)), float("-inf"))
        if top_k == 0:
            spare = (total - goal).to(tl.float64) / _MASS_ONE / vocab
            light = best + tl.log(tl.maximum(spare, 1e-300)).to(tl.float32) - _SLACK
            bound = tl.where((found == 0) & (top_p < 1), light, bound)
            bound = tl.where(top_p < 1, bound, float("-inf"))
        if (top_k == 0) | (top_p == 1):
            bound = tl.maximum(bound, best + tl.log(min_p))
        tl.store(p_bound + i_row, tl.maximum(bound, _LOWEST))
        tl.store(p_total + i_row, total)
        tl.store(p_count + i_row, 0)
