"""Sampling on the GPU: what `sampling.py` defines, in one sweep of the logits and a sparse second.

Five launches, none of which waits for the host, whatever the rows ask for:

    stats    row x tile   the tile's best (score, id). For a row with filters instead its best
                          logit, the maxima of groups of 32, its mass and its moments
    bound    row          a value below which no token can survive the filters, from the maxima
    gather   row x tile   (value, id) of every token that reaches the bound, as one sortable key.
                          Tiles and groups whose maximum does not reach it are not read
    finish   row          no filter: the best of the tiles. Filters: the cuts among the keys, found
                          bit by bit, and the draw
    wide     row          more than CAPACITY candidates (flat rows): `sampling_wide_triton.py`

Nothing of size [R, V] is written: who needs a logit again reads it again, through the same
`scaled_logits`. Rows leave a kernel that is not for them at once, so rows without filters pay for
the first sweep only. A tile is 4096 tokens of the vocabulary whatever the batch; tiles are combined
by maxima, by integer sums and by sums in order, noise is a function of (seed, position, id):
nothing depends on R or on the row.

Example: a row of 128 Ki tokens with top_k = 50 leaves 4096 group maxima, 32 tiles and, of the 50th
greatest maximum as its bound, some 70 candidates in about as many groups: gather reads 2 % of it.

Against the reference: exp and log are the device's own, so a draw can differ where two scores, or
a mass and a filter's target, lie within a few units in the last place.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.edits_triton import (
    TOP_N_SIGMA,
    is_filtered,
    scalar,
    scaled_logits,
    temperature_factors,
)
from millrace.kernels.order_triton import NO_ID
from millrace.kernels.rng import CALLS_PER_TILE, TILE
from millrace.kernels.rng_triton import gumbel_tile
from millrace.kernels.sampling import SampledTokens, check_inputs
from millrace.kernels.sampling_filters_triton import (
    CAPACITY,
    GROUP,
    GROUPS_PER_TILE,
    bound_kernel,
    finish_kernel,
    gather_kernel,
    mass_of,
)
from millrace.kernels.sampling_wide_triton import wide_kernel
from millrace.kernels.slot_sampling import SlotSampling

MAX_VOCAB = 1 << 19
"""The group maxima of a row must fit the registers of one program."""
STATS_WARPS, GATHER_WARPS, FINISH_WARPS, WIDE_WARPS = 8, 8, 4, 8
"""Warps per program: what compiles for every target without a spill, and no more."""


def bound_warps(tiles: int) -> int:
    """Warps that hold the group maxima of `tiles` tiles (a power of two) without a spill."""
    return 8 if tiles <= 32 else 16


_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def stats_kernel(
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
    p_maxima,  # f32[R, tiles * GROUPS], written for rows with filters
    p_mass,  # i64[R, tiles], relative to the tile's maximum, likewise
    p_moments,  # f64[R, 3, tiles]: finite logits, their sum and that of squares; for top-n-sigma
    p_best,  # f32[R, tiles], the tile's best score; NaN if it holds one
    p_best_id,  # i32[R, tiles]
    stride_logits,
    tiles,
    vocab,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = tl.load(p_slots + i_row), tl.load(p_positions + i_row)
    tables = (p_bias, p_has_bias, p_seen, p_counts, p_has_penalties, p_stop_ids, p_min_position)
    row = (p_logits + i_row * stride_logits, slot, position, vocab, p_scalars, tables)
    o_vocab = (  # [CALLS, 4], the order of the noise
        i_tile * _TILE + tl.arange(0, 4)[None, :] * _CALLS + tl.arange(0, _CALLS)[:, None]
    )
    x = scaled_logits(row, o_vocab, o_vocab < vocab)
    has_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    samples, _, after = temperature_factors(p_scalars, slot)
    o_out = i_row * tiles + i_tile
    score = x
    if is_filtered(p_scalars, p_seed, slot, position):
        groups = tl.max(tl.reshape(x, (_CALLS // _GROUP, _GROUP, 4)), axis=1)  # [CALLS / 32, 4]
        o_group = tl.arange(0, 4)[None, :] * (_CALLS // _GROUP)
        o_group += tl.arange(0, _CALLS // _GROUP)[:, None]
        tl.store(p_maxima + o_out * _GROUPS + o_group, groups)
        best = tl.maximum(tl.max(tl.max(groups, axis=1), axis=0), _LOWEST)
        tl.store(p_mass + o_out, tl.sum(tl.sum(mass_of(x, best), axis=1), axis=0))
        if scalar(p_scalars, slot, TOP_N_SIGMA) > 0:
            finite = x > float("-inf")
            wide = tl.where(finite, x, 0.0).to(tl.float64)
            p_out = p_moments + i_row * 3 * tiles + i_tile
            count = tl.sum(tl.sum(finite.to(tl.int32), axis=1), axis=0)
            tl.store(p_out, count.to(tl.float64))
            tl.store(p_out + tiles, tl.sum(tl.sum(wide, axis=1), axis=0))
            tl.store(p_out + 2 * tiles, tl.sum(tl.sum(wide * wide, axis=1), axis=0))
    elif samples:
        score = x * after + gumbel_tile(tl.load(p_seed + slot), position, i_tile)
    best = tl.max(tl.max(score, axis=1), axis=0)
    winners = tl.where(score == best, o_vocab, NO_ID)
    tl.store(p_best_id + o_out, tl.min(tl.min(winners, axis=1), axis=0))
    tl.store(p_best + o_out, tl.where(has_nan != 0, float("nan"), best))


def sample_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
) -> SampledTokens:
    """As `sample_reference`, on the device; never waits for it. Logits may have any row stride."""
    check_inputs(logits, slots, positions, params)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"logits: expected at most {MAX_VOCAB} columns, got {vocab}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected a last stride of 1, got {logits.stride(1)}")
    tiles = triton.cdiv(vocab, TILE)
    scratch = _Scratch.empty(rows, tiles, logits.device)
    sampled = SampledTokens(
        token_ids=torch.empty_like(slots),
        ok=torch.empty_like(slots, dtype=torch.bool),
        kept=torch.empty(rows, 4, dtype=torch.int64, device=logits.device),
    )
    if rows:
        _launch(logits, slots, positions, params, scratch, sampled, tiles)
    return sampled


@dataclass
class _Scratch:
    """What the kernels leave for one another."""

    maxima: Tensor  # f32[R, tiles * GROUPS_PER_TILE]
    masses: Tensor  # i64[R, tiles]
    moments: Tensor  # f64[R, 3, tiles]
    best: Tensor  # f32[R, tiles]
    best_id: Tensor  # i32[R, tiles]
    floor: Tensor  # f32[R]
    bound: Tensor  # f32[R]
    total: Tensor  # i64[R]
    count: Tensor  # i32[R]
    keys: Tensor  # i64[R, CAPACITY]

    @classmethod
    def empty(cls, rows: int, tiles: int, device: torch.device) -> "_Scratch":
        def of(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        return cls(
            maxima=of(torch.float32, tiles * GROUPS_PER_TILE),
            masses=of(torch.int64, tiles),
            moments=of(torch.float64, 3, tiles),
            best=of(torch.float32, tiles),
            best_id=of(torch.int32, tiles),
            floor=of(torch.float32),
            bound=of(torch.float32),
            total=of(torch.int64),
            count=of(torch.int32),
            keys=of(torch.int64, CAPACITY),
        )


def _launch(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    scratch: _Scratch,
    sampled: SampledTokens,
    tiles: int,
) -> None:
    rows, vocab = logits.shape
    p, s = params, scratch
    asked = (slots, positions, p.scalars, p.seed)
    tables = (
        *(p.bias, p.has_bias, p.prompt_seen, p.output_counts, p.has_penalties),
        *(p.stop_ids, p.min_position),
    )
    answer = (sampled.token_ids, sampled.ok, sampled.kept)
    padded = triton.next_power_of_2(tiles)
    # Without fusion x * after + noise and x - (f * c + p) round as in the reference.
    stats_kernel[(rows, tiles)](
        *(logits, *asked, *tables, s.maxima, s.masses, s.moments, s.best, s.best_id),
        *(logits.stride(0), tiles, vocab),
        num_warps=STATS_WARPS,
        enable_fp_fusion=False,
    )
    bound_kernel[(rows,)](
        *(*asked, s.maxima, s.masses, s.moments, s.best, s.floor, s.bound, s.total, s.count),
        *(tiles, vocab, padded),
        num_warps=bound_warps(padded),
    )
    gather_kernel[(rows, tiles)](
        *(logits, *asked, *tables, s.maxima, s.best, s.bound, s.count, s.keys),
        *(logits.stride(0), tiles, vocab),
        num_warps=GATHER_WARPS,
        enable_fp_fusion=False,
    )
    finish_kernel[(rows,)](
        *(*asked, s.best, s.best_id, s.floor, s.total, s.count, s.keys, *answer, tiles, padded),
        num_warps=FINISH_WARPS,
        enable_fp_fusion=False,
    )
    wide_kernel[(rows,)](
        *(logits, *asked, *tables, s.best, s.floor, s.bound, s.total, s.count, *answer),
        *(logits.stride(0), tiles, vocab, padded),
        num_warps=WIDE_WARPS,
        enable_fp_fusion=False,
    )
