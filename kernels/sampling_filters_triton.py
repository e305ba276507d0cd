"""Filters on the GPU: what `filters.py` defines, of a row's few candidates, without a sort.

`sampling_triton.py` tells the kernels' places. `bound` finds from the group maxima a value below
which no token matters, `gather` lists the tokens that reach it, and `finish` applies the filters
to that list in registers: a cut is the greatest key at or above which the list weighs enough, and
is found bit by bit. Other rows leave at once.

Of a flat row the list holds only the tokens whose fate is in doubt (`sampling_flat_triton.py`);
`survivors` then also takes sums of the tokens outside of it, as a tuple `outside`:

    count        tokens outside that pass top-k
    mass_1       the mass of those that reach typical-p, that is pass all before it; distance_1 the
                 sum of their `weighted_distance`
    mass_2, _3, _4   the mass of those that reach top-p, min-p and XTC
    best         the greatest logit of those that reach min-p
"""

import torch
import triton
import triton.language as tl

from millrace.kernels.edits_triton import (
    NO_XTC,
    filters_of,
    is_filtered,
    scaled_logits,
    temperature_factors,
)
from millrace.kernels.logprobs import MASS_ONE
from millrace.kernels.order_triton import (
    KEY_BITS,
    NO_ID,
    SIGN,
    key_id,
    key_of,
    key_value,
    nearness,
    order_of,
    store_kept,
    value_of,
)
from millrace.kernels.rng import TILE
from millrace.kernels.rng_triton import gumbel_at
from millrace.kernels.rows_triton import MIN_P, TOP_K, TOP_N_SIGMA, TOP_P, TYPICAL_P, asked, row_at

GROUP = 32
GROUPS_PER_TILE = TILE // GROUP
CAPACITY = 1024
"""Candidates that `finish` holds in registers."""
KEY_ROOM = 4096
"""Keys that a row has room for: a flat row's list may be longer, `settle` has more registers."""
GATHER_PARTS, PART_GROUPS = 16, 64  # a part is one program's share
LISTED_GROUPS = GATHER_PARTS * PART_GROUPS
"""Groups that are gathered from; a row of more has more than CAPACITY candidates for sure."""


def bound_options(tiles: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """As many warps as hold the group maxima of `tiles` tiles, a power of two, without a spill.

    AMD's have 64 lanes, so that half as many have as many registers.
    """
    return {"num_warps": 8 if tiles <= 32 or amd else 16}


_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_CAPACITY = tl.constexpr(CAPACITY)
_KEY_ROOM = tl.constexpr(KEY_ROOM)
_PART = tl.constexpr(PART_GROUPS)
_LISTED = tl.constexpr(LISTED_GROUPS)
_MASS_ONE = tl.constexpr(MASS_ONE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_WEIGHTLESS = tl.constexpr(32.0)  # logits that far below the best weigh nothing in fixed point
_BOUND_SLACK = tl.constexpr(1e-3)  # lowers a bound made with exp and log by more than they round


@triton.jit
def mass_of(x, best):
    """floor(exp(x - best) * 2^40) as int64."""
    return (tl.exp(x - best) * _MASS_ONE).to(tl.int64)


@triton.jit
def share_of(share, total):
    """`filters.share_of`."""
    target = tl.ceil(share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(target, total), 1)


@triton.jit
def weighted_distance(x, best):
    """A token's mass times its distance to the best, fixed point; 0 of -inf."""
    below = tl.where(x > float("-inf"), best - x, 0.0)
    return (tl.exp(-below) * below * _MASS_ONE).to(tl.int64)


@triton.jit
def expected_logit(best, distance, total):
    """E[l] from the sums of `weighted_distance` and of `mass_of`."""
    return best - (distance.to(tl.float64) / total.to(tl.float64)).to(tl.float32)


@triton.jit
def uses_row_mass(row):
    """Whether top-p is the first filter of the row, so that it measures by the whole row's mass."""
    first = (asked(row, TOP_K) == 0) & (asked(row, TOP_N_SIGMA) == 0)
    return first & (asked(row, TYPICAL_P) == 1) & (asked(row, TOP_P) < 1)


@triton.jit
def head(keys, weights, outside, goal, BITS: tl.constexpr):
    """The greatest bound below 2^BITS at or above which keys >= 0 and what lies `outside` weigh
    `goal` or more; else 0."""
    bound = tl.zeros((), tl.int64)
    for i_bit in range(BITS):
        trial = bound | (tl.full((), 1, tl.int64) << (BITS - 1 - i_bit))
        weight = outside + tl.sum(tl.where(keys >= trial, weights, 0), axis=0)
        bound = tl.where(weight >= goal, trial, bound)
    return bound


@triton.jit
def _n_sigma_bound(p_moments, tiles, best, n_sigma, TILES: tl.constexpr):
    """max - n * std, from the tiles' moments f64[3, tiles]."""
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tiles
    count = tl.sum(tl.load(p_moments + o_tile, mask=m_tile, other=0.0), axis=0)
    total = tl.sum(tl.load(p_moments + tiles + o_tile, mask=m_tile, other=0.0), axis=0)
    squares = tl.sum(tl.load(p_moments + 2 * tiles + o_tile, mask=m_tile, other=0.0), axis=0)
    count = tl.maximum(count, 1.0)
    mean = total / count
    variance = tl.maximum(squares / count - mean * mean, 0.0)
    return (best.to(tl.float64) - n_sigma.to(tl.float64) * tl.sqrt(variance)).to(tl.float32)


@triton.jit
def list_groups(p_groups, m_group, ROOM: tl.constexpr):
    """Write the numbers of the marked groups in ascending order, as far as there is room. Returns
    how many are marked."""
    o_group = tl.arange(0, m_group.shape[0])
    place = tl.cumsum(m_group.to(tl.int32), axis=0) - 1
    tl.store(p_groups + place, o_group, mask=m_group & (place < ROOM))
    return tl.sum(m_group.to(tl.int32), axis=0)


@triton.jit
def append_keys(p_count, p_keys, keys, m_keys, ROOM: tl.constexpr):
    """Append the marked keys to a list, in no order; the count goes on where the room ends."""
    marked = m_keys.to(tl.int32)
    start = tl.atomic_add(p_count, tl.sum(marked, axis=0))
    o_key = start + tl.cumsum(marked, axis=0) - 1
    tl.store(p_keys + o_key, keys, mask=m_keys & (o_key < ROOM))


@triton.jit
def bound_kernel(
    rows,
    p_maxima,
    p_mass,
    p_moments,
    p_best,
    p_floor,  # f32[R], top-n-sigma's bound
    p_bound,  # f32[R]
    p_total,  # i64[R], the row's mass
    p_groups,  # i32[R, LISTED_GROUPS], those that reach the bound, if they fit
    p_num_groups,  # i32[R], how many reach it
    p_count,  # i32[R], set to 0, or above CAPACITY where the groups alone are more
    p_flat,  # i32[1 + R], its first set to 0
    tiles,
    TILES: tl.constexpr,  # tiles, rounded up to a power of two
):
    i_row = tl.program_id(0).to(tl.int64)
    row = row_at(rows, i_row)
    if i_row == 0:
        tl.store(p_flat, 0)
    tl.store(p_count + i_row, 0)
    tl.store(p_num_groups + i_row, 0)
    if is_filtered(row):
        n_sigma, top_k = asked(row, TOP_N_SIGMA), asked(row, TOP_K)
        top_p, by_mass = asked(row, TOP_P), uses_row_mass(row)
        o_tile, o_group = tl.arange(0, TILES), tl.arange(0, TILES * _GROUPS)
        m_tile, m_group = o_tile < tiles, o_group < tiles * _GROUPS
        bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
        best = tl.maximum(tl.max(bests, axis=0), _LOWEST)
        masses = tl.load(p_mass + i_row * tiles + o_tile, mask=m_tile, other=0)
        # Masses are relative to each tile's maximum; in double the change of base is exact enough.
        share = tl.exp(tl.maximum(bests, _LOWEST).to(tl.float64) - best.to(tl.float64))
        total = tl.sum((masses.to(tl.float64) * share).to(tl.int64), axis=0)
        tl.store(p_total + i_row, total)
        bound = tl.full((), float("-inf"), tl.float32)
        maxima = tl.load(
            p_maxima + i_row * tiles * _GROUPS + o_group, mask=m_group, other=float("-inf")
        )
        if (top_k > 0) | by_mass:
            # The greatest bound at or above which the maxima alone are k, or weigh top-p's target.
            goal = tl.where(by_mass, share_of(top_p, total), top_k.to(tl.int64))
            weight = tl.where(by_mass, mass_of(maxima, best), tl.full((), 1, tl.int64))
            found = head(order_of(maxima).to(tl.int64) + SIGN, weight, 0, goal, 32)
            bound = tl.where(found > 0, value_of((found - SIGN).to(tl.int32)), bound)
            # Should all maxima together weigh too little for top-p: tokens lighter than 1/V of what
            # may be left out cannot together weigh more than that.
            spare = (total - goal).to(tl.float64) / _MASS_ONE / rows.vocab
            light = best + tl.log(tl.maximum(spare, 1e-300)).to(tl.float32) - _BOUND_SLACK
            bound = tl.where((found == 0) & by_mass, light, bound)
        floor = tl.full((), _LOWEST, tl.float32)
        if n_sigma > 0:
            p_row = p_moments + i_row * 3 * tiles
            floor = tl.maximum(_n_sigma_bound(p_row, tiles, best, n_sigma, TILES), floor)
        tl.store(p_floor + i_row, floor)
        # A filter that measures mass needs all that the ones before it left: min-p must wait.
        may_cut = (asked(row, TYPICAL_P) == 1) & ((top_p == 1) | by_mass)
        lowest = best + tl.log(asked(row, MIN_P))
        bound = tl.where(may_cut, tl.maximum(bound, lowest), bound)
        bound = tl.maximum(bound, floor)
        tl.store(p_bound + i_row, bound)
        num_groups = list_groups(p_groups + i_row * _LISTED, maxima >= bound, _LISTED)
        tl.store(p_num_groups + i_row, num_groups)
        tl.store(p_count + i_row, tl.where(num_groups > _LISTED, _CAPACITY + 1, 0))


@triton.jit
def gather_kernel(
    rows,
    p_bound,
    p_groups,
    p_num_groups,  # i32[R], 0 where the row has no filter
    p_count,  # i32[R], how many tokens reach the bound; exact up to CAPACITY
    p_keys,  # i64[R, KEY_ROOM], the first CAPACITY of them, in no order
):
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_groups = tl.load(p_num_groups + i_row)
    if (i_part * _PART < num_groups) & (num_groups <= _LISTED):
        row = row_at(rows, i_row)
        o_group = i_part * _PART + tl.arange(0, _PART)
        m_group = o_group < num_groups
        groups = tl.load(p_groups + i_row * _LISTED + o_group, mask=m_group, other=0)
        o_vocab = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]  # [PART, GROUP]
        x = scaled_logits(row, o_vocab, (o_vocab < rows.vocab) & m_group[:, None])
        m_kept = tl.reshape(x >= tl.load(p_bound + i_row), (_PART * _GROUP,))
        keys = tl.reshape(key_of(x, o_vocab), (_PART * _GROUP,))
        append_keys(p_count + i_row, p_keys + i_row * _KEY_ROOM, keys, m_kept, _CAPACITY)


@triton.jit
def finish_kernel(
    rows,
    p_best,
    p_best_id,
    p_least,
    p_floor,
    p_bound,
    p_total,
    p_count,
    p_keys,
    p_ok,  # bool[R]
    p_token_ids,  # i64[R]
    p_kept,  # i64[R, 4], see `order_triton.survives`
    p_flat,  # i32[1 + R]: how many rows are flat, and which, in no order
    p_span,  # f32[R, 2], of these: the best logit, and the width of a bin
    p_bins,  # i32[R, BINS], set to 0 for these
    p_sums,  # i64[R, SUMS], likewise
    tiles,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    SUMS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = row_at(rows, i_row)
    zero, beyond = tl.full((), 0, tl.int64), tl.full((), 1, tl.int64) << KEY_BITS
    everything = (zero, beyond, zero, tl.full((), 0, tl.float32))
    store_kept(p_kept + i_row * 4, everything)
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tiles
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
    ids = tl.load(p_best_id + i_row * tiles + o_tile, mask=m_tile, other=NO_ID)
    best = tl.max(bests, axis=0)
    token_id = tl.min(tl.where(bests == best, ids, NO_ID), axis=0)
    ok = (best > float("-inf")) & (tl.max((bests != bests).to(tl.int32), axis=0) == 0)
    tl.store(p_ok + i_row, ok)
    if is_filtered(row) & ok & (best < float("inf")):
        count = tl.load(p_count + i_row)
        if count <= _CAPACITY:
            o_key = tl.arange(0, _CAPACITY)
            keys = tl.load(p_keys + i_row * _KEY_ROOM + o_key, mask=o_key < count, other=0)
            m_kept = (o_key < count) & (key_value(keys) >= tl.load(p_floor + i_row))
            nothing = (zero, zero, zero, zero, zero, zero, float("-inf"))
            total = tl.load(p_total + i_row)
            m_kept, high, near, expected = survivors(row, keys, m_kept, best, total, nothing)
            low = tl.min(tl.where(m_kept, keys, beyond), axis=0)
            store_kept(p_kept + i_row * 4, (low, high, near, expected))
            _, token_id = draw_from_list(row, keys, m_kept)
        else:
            tl.store(p_flat + 1 + tl.atomic_add(p_flat, 1), i_row.to(tl.int32))
            leasts = tl.load(p_least + i_row * tiles + o_tile, mask=m_tile, other=float("inf"))
            lowest = tl.maximum(tl.load(p_bound + i_row), tl.min(leasts, axis=0))
            reach = tl.minimum(best - lowest, _WEIGHTLESS)
            tl.store(p_span + i_row * 2, best)
            tl.store(p_span + i_row * 2 + 1, tl.maximum(reach / (BINS - 1), 1e-37))
            tl.store(p_bins + i_row * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
            for i_sum in tl.static_range(SUMS):
                tl.store(p_sums + i_row * SUMS + i_sum, zero)
    tl.store(p_token_ids + i_row, tl.where(ok, token_id, 0).to(tl.int64))


@triton.jit
def draw_from_list(row, keys, m_kept):
    """The best score of the kept keys, and its token's id."""
    _, _, after = temperature_factors(row)
    ids = key_id(keys)
    noise = gumbel_at(row.seed, row.position, ids)
    score = tl.where(m_kept, key_value(keys) * after + noise, float("-inf"))
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(m_kept & (score == best), ids, NO_ID), axis=0)


@triton.jit
def survivors(row, keys, m_kept, best, row_total, outside):
    """Which of a row's listed tokens survive the filters after top-n-sigma; the greatest key that
    XTC leaves, and typical-p's (near, expected)."""
    count, mass_1, distance_1, mass_2, mass_3, mass_4, best_outside = outside
    beyond = tl.full((), 1, tl.int64) << KEY_BITS
    high, near, expected = beyond, tl.full((), 0, tl.int64), tl.full((), 0, tl.float32)
    top_k, typical_p, top_p, min_p, xtc = filters_of(row)
    if top_k > 0:
        cut = head(keys, m_kept.to(tl.int64), count, top_k.to(tl.int64), KEY_BITS)
        m_kept = m_kept & (keys >= cut)
    x = key_value(keys)
    masses = mass_of(x, best)
    if typical_p < 1:
        kept_masses = tl.where(m_kept, masses, 0)
        total = mass_1 + tl.sum(kept_masses, axis=0)
        distance = distance_1 + tl.sum(tl.where(m_kept, weighted_distance(x, best), 0), axis=0)
        expected = expected_logit(best, distance, total)
        nearest = nearness(x, expected)
        near = head(nearest, kept_masses, mass_2, share_of(typical_p, total), 31)
        m_kept = m_kept & (nearest >= near)
    if top_p < 1:
        kept_masses = tl.where(m_kept, masses, 0)
        total = mass_2 + tl.sum(kept_masses, axis=0)
        total = tl.where(uses_row_mass(row), row_total, total)
        m_kept = m_kept & (
            keys >= head(keys, kept_masses, mass_3, share_of(top_p, total), KEY_BITS)
        )
    if min_p > 0:
        best_kept = tl.maximum(tl.max(tl.where(m_kept, x, float("-inf")), axis=0), best_outside)
        m_kept = m_kept & (x >= best_kept + tl.log(min_p))
    if xtc < NO_XTC:
        kept_masses = tl.where(m_kept, masses, 0)
        goal = share_of(xtc, mass_4 + tl.sum(kept_masses, axis=0))
        high = tl.min(tl.where(m_kept & (kept_masses >= goal), keys, beyond), axis=0)
        m_kept = m_kept & (keys <= high)
    return m_kept, high, near, expected
