"""Filters of flat rows on the GPU: too many candidates for a list, so most of them are decided by
the bin they fall in, in two more sweeps of the logits, side by side over tiles.

    count     flat row x block  how many candidates fall in each of 4096 bins: of equal width from
                                the best logit down, and one for all below
    bracket   flat row          the fate of each bin: what a filter must do to all of its tokens, or
                                IN_DOUBT
    sift      flat row x block  lists the tokens in doubt; sums the others by their fate; draws
                                among those that are certain to survive
    settle    flat row          the filters over the list, beside the sums; the better of two draws

Where a bin's logits lie between a and b, its n tokens weigh between n exp(a) and n exp(b): with
4096 bins that is known to 0.3 %. So the bins before which a filter's goal cannot have been reached
are kept, those before which it must have been are dropped, and what is left is where the cut is.
Each filter narrows two sets of bins, those that `may` hold survivors and those that `must` survive
as a whole. Nothing here has to be sharp but the list: its tokens are decided by the same code as a
row's few candidates, on exact integer sums.

Example: top-p 0.9 of 131072 normal logits of deviation 2.5, of which 49598 reach the bound. Some
1000 tokens in 20 bins are in doubt, and two sweeps settle the row.

More tokens in doubt than KEY_ROOM (thousands of equal logits at a cut) are left to
`sampling_exhaustive_triton.py`. Programs step through the list of flat rows, so that an empty one
costs next to nothing.
"""

import triton
import triton.language as tl

from millrace.kernels.edits_triton import NO_XTC, filters_of, scaled_logits, temperature_factors
from millrace.kernels.order_triton import KEY_BITS, NO_ID, key_of, store_kept
from millrace.kernels.rng import CALLS_PER_TILE, TILE
from millrace.kernels.rng_triton import gumbel_calls
from millrace.kernels.rows_triton import row_at
from millrace.kernels.sampling_filters_triton import (
    KEY_ROOM,
    append_keys,
    draw_from_list,
    mass_of,
    survivors,
    uses_row_mass,
    weighted_distance,
)

BINS = 4096
BLOCKS_PER_TILE = 2
"""Blocks that a tile is cut into, so that a program's tokens fit its registers. `sift` cuts it so
that a block's tokens share the calls of their noise."""
SUMS = 6
"""Of the tokens outside the list: their number, mass_1, distance_1, mass_2, mass_3 and mass_4."""

_BINS = tl.constexpr(BINS)
_SUMS = tl.constexpr(SUMS)
_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_BLOCKS = tl.constexpr(BLOCKS_PER_TILE)
_BLOCK = tl.constexpr(TILE // BLOCKS_PER_TILE)
_BLOCK_CALLS = tl.constexpr(CALLS_PER_TILE // BLOCKS_PER_TILE)
_KEY_ROOM = tl.constexpr(KEY_ROOM)
# Fates, ordered by how far a token comes: dropped by top-k (or below the bound), ..., by XTC.
_BY_TOP_K, _BY_TYPICAL, _BY_TOP_P = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BY_MIN_P, _BY_XTC, _SURVIVES = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
_IN_DOUBT = tl.constexpr(-1)
_SLACK = tl.constexpr(1e-4)  # of masses and sums of bins: more than float32 rounds them
_LEAST_MASS = tl.constexpr(2.0**-40)
_HALVINGS = tl.constexpr(24)


@triton.jit
def _bins_of(x, best, width):
    """The bins i32 of logits; ascending as these fall, whatever rounds."""
    bins = (best.to(tl.float64) - x.to(tl.float64)) * (1.0 / width.to(tl.float64))
    return tl.minimum(tl.maximum(bins, 0.0), _BINS - 1.0).to(tl.int32)


@triton.jit
def count_kernel(
    rows,
    p_best,
    p_bound,
    p_flat,
    p_span,
    p_bins,
    tiles,
):
    blocks = tiles * _BLOCKS
    for i_item in range(tl.program_id(0), tl.load(p_flat) * blocks, tl.num_programs(0)):
        i_row, i_block = tl.load(p_flat + 1 + i_item // blocks).to(tl.int64), i_item % blocks
        bound = tl.load(p_bound + i_row)
        if tl.load(p_best + i_row * tiles + i_block // _BLOCKS) >= bound:
            row = row_at(rows, i_row)
            best, width = tl.load(p_span + i_row * 2), tl.load(p_span + i_row * 2 + 1)
            o_vocab = i_block * _BLOCK + tl.arange(0, _BLOCK)
            x = scaled_logits(row, o_vocab, o_vocab < rows.vocab)
            # Not tl.histogram, which costs each warp as many registers as there are bins.
            bins = _bins_of(tl.maximum(x, bound), best, width)
            tl.atomic_add(p_bins + i_row * _BINS + bins, 1, mask=x >= bound, sem="relaxed")


@triton.jit
def _narrow(fate, may, must, may_pass, must_pass, DROPPED: tl.constexpr):
    """One filter's say: (fates, bins that may hold survivors, bins that survive as a whole)."""
    fate = tl.where(must & ~may_pass, DROPPED, fate)
    fate = tl.where(must & may_pass & ~must_pass, _IN_DOUBT, fate)
    return fate, may & may_pass, must & must_pass


@triton.jit
def _typical_bins(n, may, must, y_0, y_1, width, heavy, light, typical_p):
    """Bins that typical-p may, and must, let pass. y is the distance of a logit to the best; bins
    reach from y_0 to y_1, a token in one weighs from `light` to `heavy`. The last bin has no end;
    what it weighs is less than the slack."""
    middle = y_0 + width * 0.5
    weight = tl.where(must, n * tl.exp(-middle), 0.0)
    doubtful = tl.where(may & ~must, n * heavy, 0.0)
    sure = tl.sum(tl.where(must, n * light, 0.0), axis=0)
    at_most = tl.sum(tl.where(may, n * heavy, 0.0), axis=0)
    around = tl.sum(weight * middle, axis=0) / tl.maximum(tl.sum(weight, axis=0), 1e-30)
    # Weights are known to a factor of exp(width), and doubtful tokens may count or not: how far the
    # expected y can lie from `around`.
    blur = (tl.exp(width) - 1.0 + _SLACK) * weight + doubtful
    off = tl.sum(blur * tl.abs(middle - around), axis=0) / tl.maximum(sure, 1e-30)
    off = tl.minimum(off * (1.0 + _SLACK) + width, 1e30)
    low, high = around - off, around + off
    nearest = tl.maximum(tl.maximum(y_0 - high, low - y_1), 0.0)
    farthest = tl.maximum(tl.maximum(y_1 - low, high - y_0), 0.0)
    # Within `inner` lies less than the goal, within `outer` the goal or more.
    span = tl.maximum(tl.max(middle, axis=0) - low, high)
    inner, outer = tl.full((), 0.0, tl.float32), span
    for _i_halving in range(_HALVINGS):
        span = span * 0.5
        heaviest = tl.sum(tl.where(may & (nearest <= inner + span), n * heavy, 0.0), axis=0)
        inner = tl.where(heaviest <= typical_p * sure * (1.0 - _SLACK), inner + span, inner)
        lightest = tl.sum(tl.where(must & (farthest <= outer - span), n * light, 0.0), axis=0)
        outer = tl.where(lightest >= typical_p * at_most * (1.0 + _SLACK), outer - span, outer)
    return nearest <= outer, farthest <= tl.where(sure > 0.0, inner, -1.0)


@triton.jit
def bracket_kernel(
    rows,
    p_bound,
    p_total,
    p_count,  # i32[R], set to 0, or above KEY_ROOM where so many are in doubt
    p_flat,
    p_span,
    p_bins,
    p_fates,  # i8[R, BINS]
    p_sums,  # i64[R, SUMS], the first set
):
    if tl.program_id(0) < tl.load(p_flat):
        i_row = tl.load(p_flat + 1 + tl.program_id(0)).to(tl.int64)
        row = row_at(rows, i_row)
        top_k, typical_p, top_p, min_p, xtc = filters_of(row)
        best, width = tl.load(p_span + i_row * 2), tl.load(p_span + i_row * 2 + 1)
        o_bin = tl.arange(0, _BINS)
        counts = tl.load(p_bins + i_row * _BINS + o_bin)
        n = counts.to(tl.float32)
        # Edges give way by what float32 rounds where logits are compared, masses by their slack.
        give = (tl.abs(best) + width * _BINS) * 1e-6 + 1e-30
        y_0 = tl.maximum(o_bin.to(tl.float32) * width - give, 0.0)
        y_1 = tl.where(o_bin < _BINS - 1, (o_bin + 1).to(tl.float32) * width + give, float("inf"))
        heavy = tl.exp(-y_0) * (1.0 + _SLACK)
        light = tl.maximum(tl.exp(-y_1) * (1.0 - _SLACK) - _LEAST_MASS, 0.0)
        may = counts > 0
        must = may
        fate = tl.full((_BINS,), _SURVIVES, tl.int32)
        if top_k > 0:
            through = tl.cumsum(counts, axis=0)
            may_pass, must_pass = through - counts < top_k, through <= top_k
            fate, may, must = _narrow(fate, may, must, may_pass, must_pass, _BY_TOP_K)
        if typical_p < 1:
            may_pass, must_pass = _typical_bins(
                n, may, must, y_0, y_1, width + 2 * give, heavy, light, typical_p
            )
            fate, may, must = _narrow(fate, may, must, may_pass, must_pass, _BY_TYPICAL)
        if top_p < 1:
            at_least, at_most = tl.where(must, n * light, 0.0), tl.where(may, n * heavy, 0.0)
            total = tl.load(p_total + i_row).to(tl.float32) * _LEAST_MASS
            by_row = uses_row_mass(row)
            least = top_p * tl.where(by_row, total, tl.sum(at_least, axis=0)) * (1.0 - _SLACK)
            most = top_p * tl.where(by_row, total, tl.sum(at_most, axis=0)) * (1.0 + _SLACK)
            may_pass = tl.cumsum(at_least, axis=0) - at_least < most
            must_pass = tl.cumsum(at_most, axis=0) <= least
            fate, may, must = _narrow(fate, may, must, may_pass, must_pass, _BY_TOP_P)
        if min_p > 0:
            reach = -tl.log(min_p)
            first = tl.min(tl.where(may, y_0, 1e30), axis=0)
            surely = tl.min(tl.where(must, y_1, 1e30), axis=0)
            may_pass, must_pass = y_0 <= surely + reach + give, y_1 <= first + reach - give
            fate, may, must = _narrow(fate, may, must, may_pass, must_pass, _BY_MIN_P)
        if xtc < NO_XTC:
            least = xtc * tl.sum(tl.where(must, n * light, 0.0), axis=0) * (1.0 - _SLACK)
            most = xtc * tl.sum(tl.where(may, n * heavy, 0.0), axis=0) * (1.0 + _SLACK)
            # The last token of the head that XTC cuts lies between these bins.
            surely = tl.max(tl.where(must & (light >= most), o_bin, -1), axis=0)
            maybe = tl.max(tl.where(may & (heavy >= least), o_bin, -1), axis=0)
            fate, may, must = _narrow(fate, may, must, o_bin >= surely, o_bin > maybe, _BY_XTC)
        tl.store(p_fates + i_row * _BINS + o_bin, fate.to(tl.int8))
        outside = tl.sum(tl.where(fate > _BY_TOP_K, counts, 0), axis=0)
        tl.store(p_sums + i_row * _SUMS, outside.to(tl.int64))
        in_doubt = tl.sum(tl.where(fate == _IN_DOUBT, counts, 0), axis=0)
        tl.store(p_count + i_row, tl.where(in_doubt <= _KEY_ROOM, 0, _KEY_ROOM + 1))


@triton.jit
def _add_up(p_sums, x, fate, best):
    """Add a tile's share to a row's sums, but for their number."""
    masses, apart = mass_of(x, best), weighted_distance(x, best)
    for i_sum in tl.static_range(1, _SUMS):
        weights = apart if i_sum == 2 else masses
        least = 1 if i_sum < 3 else i_sum - 1
        share = tl.sum(tl.sum(tl.where(fate >= least, weights, 0), axis=1), axis=0)
        if share > 0:
            tl.atomic_add(p_sums + i_sum, share, sem="relaxed")


@triton.jit
def sift_kernel(
    rows,
    p_bound,
    p_count,
    p_keys,
    p_flat,
    p_span,
    p_fates,
    p_sums,
    p_certain_score,  # f32[R, blocks], of the tokens certain to survive: the best score
    p_certain_id,  # i32[R, blocks], its token
    p_certain_low,  # i64[R, blocks], their least key
    p_certain_top,  # f32[R, blocks], the greatest logit of those certain to reach min-p
    tiles,
):
    beyond = tl.full((), 1, tl.int64) << KEY_BITS
    blocks = tiles * _BLOCKS
    for i_item in range(tl.program_id(0), tl.load(p_flat) * blocks, tl.num_programs(0)):
        i_row, i_block = tl.load(p_flat + 1 + i_item // blocks).to(tl.int64), i_item % blocks
        if tl.load(p_count + i_row) <= _KEY_ROOM:
            row = row_at(rows, i_row)
            best, width = tl.load(p_span + i_row * 2), tl.load(p_span + i_row * 2 + 1)
            bound = tl.load(p_bound + i_row)
            i_tile, first_call = i_block // _BLOCKS, i_block % _BLOCKS * _BLOCK_CALLS
            o_call = first_call + tl.arange(0, _BLOCK_CALLS)
            o_word = tl.arange(0, 4)[None, :] * _CALLS  # [CALLS, 4], the order of the noise
            o_vocab = i_tile * _TILE + o_word + o_call[:, None]
            x = scaled_logits(row, o_vocab, o_vocab < rows.vocab)
            bins = _bins_of(tl.maximum(x, bound), best, width)
            fate = tl.load(p_fates + i_row * _BINS + bins, mask=x >= bound, other=0).to(tl.int32)
            keys = key_of(x, o_vocab)
            in_doubt = tl.reshape(fate == _IN_DOUBT, (_BLOCK_CALLS * 4,))
            listed, p_list = tl.reshape(keys, (_BLOCK_CALLS * 4,)), p_keys + i_row * _KEY_ROOM
            append_keys(p_count + i_row, p_list, listed, in_doubt, _KEY_ROOM)
            _add_up(p_sums + i_row * _SUMS, x, fate, best)
            m_kept = fate == _SURVIVES
            _, _, after = temperature_factors(row)
            noise = gumbel_calls(row.seed, row.position, i_tile * _CALLS + o_call)
            noise = tl.reshape(noise, (_BLOCK_CALLS, 4))
            score = tl.where(m_kept, x * after + noise, float("-inf"))
            top = tl.max(tl.max(score, axis=1), axis=0)
            winners = tl.where(m_kept & (score == top), o_vocab, NO_ID)
            o_out = i_row * blocks + i_block
            tl.store(p_certain_score + o_out, top)
            tl.store(p_certain_id + o_out, tl.min(tl.min(winners, axis=1), axis=0))
            low = tl.min(tl.min(tl.where(m_kept, keys, beyond), axis=1), axis=0)
            tl.store(p_certain_low + o_out, low)
            passed = tl.where(fate >= _BY_MIN_P, x, float("-inf"))
            tl.store(p_certain_top + o_out, tl.max(tl.max(passed, axis=1), axis=0))


@triton.jit
def settle_kernel(
    rows,
    p_total,
    p_count,
    p_keys,
    p_flat,
    p_span,
    p_sums,
    p_certain_score,
    p_certain_id,
    p_certain_low,
    p_certain_top,
    p_token_ids,
    p_kept,
    tiles,
    TILES: tl.constexpr,
):
    if tl.program_id(0) < tl.load(p_flat):
        i_row = tl.load(p_flat + 1 + tl.program_id(0)).to(tl.int64)
        count = tl.load(p_count + i_row)
        if count <= _KEY_ROOM:
            row = row_at(rows, i_row)
            beyond = tl.full((), 1, tl.int64) << KEY_BITS
            o_block = tl.arange(0, TILES * _BLOCKS)
            m_block, o_block = o_block < tiles * _BLOCKS, i_row * tiles * _BLOCKS + o_block
            tops = tl.load(p_certain_top + o_block, mask=m_block, other=float("-inf"))
            p_sum = p_sums + i_row * _SUMS
            mass_1, distance_1, mass_2 = tl.load(p_sum + 1), tl.load(p_sum + 2), tl.load(p_sum + 3)
            mass_3, mass_4, top = tl.load(p_sum + 4), tl.load(p_sum + 5), tl.max(tops, axis=0)
            outside = (tl.load(p_sum), mass_1, distance_1, mass_2, mass_3, mass_4, top)
            o_key = tl.arange(0, _KEY_ROOM)
            keys = tl.load(p_keys + i_row * _KEY_ROOM + o_key, mask=o_key < count, other=0)
            best, total = tl.load(p_span + i_row * 2), tl.load(p_total + i_row)
            m_kept, high, near, expected = survivors(row, keys, o_key < count, best, total, outside)
            lows = tl.load(p_certain_low + o_block, mask=m_block, other=beyond)
            low = tl.min(tl.where(m_kept, keys, beyond), axis=0)
            low = tl.minimum(low, tl.min(lows, axis=0))
            store_kept(p_kept + i_row * 4, (low, high, near, expected))
            score, token_id = draw_from_list(row, keys, m_kept)
            scores = tl.load(p_certain_score + o_block, mask=m_block, other=float("-inf"))
            ids = tl.load(p_certain_id + o_block, mask=m_block, other=NO_ID)
            best_score = tl.maximum(tl.max(scores, axis=0), score)
            ids = tl.where(scores == best_score, ids, NO_ID)
            token_id = tl.where(score == best_score, token_id, NO_ID)
            token_id = tl.minimum(tl.min(ids, axis=0), token_id)
            tl.store(p_token_ids + i_row, token_id.to(tl.int64))
