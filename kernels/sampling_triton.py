"""Sampling on the GPU: what `sampling.py` defines, in one sweep of the logits and a sparse second.

Five launches, none of which waits for the host, whatever the rows ask for:

    stats    row x tile   edits, temperature; the tile's best (score, id). For a row with filters
                          also its scaled logits, the maxima of groups of 32 and its mass
    bound    row          a value below which no token can survive the filters, from the maxima
    gather   row x tile   (value, id) of every token that reaches the bound, as one sortable key;
                          most tiles see from their maximum alone that they hold none
    finish   row          no filter: the best of the tiles. Filters: find the cuts among the keys
                          bit by bit, draw
    wide     row          more than CAPACITY candidates (flat rows): find the cuts the same way
                          over the whole row, some 35 sweeps a filter by one program

Rows leave a kernel that is not for them at once, so rows without filters pay for the first sweep
only. A tile is 4096 tokens of the vocabulary whatever the batch; tiles are combined by maxima and
by integer sums, noise is a function of (seed, position, id): nothing depends on R or on the row.

Against the reference: exp and log are the device's own, so a draw can differ where two scores, or
a mass and top-p's target, lie within a few units in the last place.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.order_triton import NO_ID
from millrace.kernels.rng import CALLS_PER_TILE, TILE
from millrace.kernels.rng_triton import gumbel_tile
from millrace.kernels.sampling import (
    GREEDY_BELOW,
    SampledTokens,
    check_inputs,
)
from millrace.kernels.sampling_filters_triton import (
    CAPACITY,
    GROUPS_PER_TILE,
    bound_kernel,
    filters,
    finish_kernel,
    gather_kernel,
    mass_of,
    wide_kernel,
)
from millrace.kernels.slot_sampling import MAX_STOP_IDS, SlotSampling

MAX_VOCAB = 1 << 19
"""The group maxima of a row must fit the registers of one program."""
STATS_WARPS, GATHER_WARPS, FINISH_WARPS, WIDE_WARPS = 8, 8, 8, 8
"""Warps per program: what compiles for sm_90 without a spill, and no more."""


def bound_warps(tiles: int) -> int:
    """Warps that hold the group maxima of `tiles` tiles (a power of two) without a spill."""
    return 8 if tiles <= 32 else 16


_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_STOPS = tl.constexpr(MAX_STOP_IDS)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _penalised(
    x, o_vocab, m_vocab, slot, vocab, p_repetition, p_presence, p_frequency, p_seen, p_counts
):
    counts = tl.load(p_counts + slot * vocab + o_vocab, mask=m_vocab, other=0)
    seen = tl.load(p_seen + slot * vocab + o_vocab, mask=m_vocab, other=0).to(tl.int32)
    penalty = tl.load(p_repetition + slot)
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty)
    x = tl.where((counts > 0) | (seen != 0), repeated, x)
    said = tl.load(p_frequency + slot) * counts.to(tl.float32) + tl.load(p_presence + slot)
    return tl.where(counts > 0, x - said, x)


@triton.jit
def stats_kernel(
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
    x = tl.load(p_logits + i_row * stride_logits + o_vocab, mask=m_vocab, other=float("-inf"))
    x = x.to(tl.float32)
    if tl.load(p_has_bias + slot):
        x += tl.load(p_bias + slot * vocab + o_vocab, mask=m_vocab, other=0.0)
    if position < tl.load(p_min_position + slot):
        for i_stop in range(_STOPS):
            stop_id = tl.load(p_stop_ids + slot * _STOPS + i_stop)
            x = tl.where(o_vocab == stop_id, x + float("-inf"), x)
    if tl.load(p_has_penalties + slot):
        x = _penalised(
            x,
            o_vocab,
            m_vocab,
            slot,
            vocab,
            p_repetition,
            p_presence,
            p_frequency,
            p_seen,
            p_counts,
        )
    has_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    temperature = tl.load(p_temperature + slot)
    _, _, _, filtered = filters(slot, p_temperature, p_top_k, p_top_p, p_min_p)
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
            masses = tl.sum(tl.sum(mass_of(x, best), axis=1), axis=0)
            tl.store(p_mass + i_row * tiles + i_tile, masses)
        else:
            score = x + gumbel_tile(tl.load(p_seed + slot), position, i_tile)
    best = tl.max(tl.max(score, axis=1), axis=0)
    winners = tl.where(score == best, o_vocab, NO_ID)
    tl.store(p_best_id + i_row * tiles + i_tile, tl.min(tl.min(winners, axis=1), axis=0))
    best = tl.where(has_nan != 0, float("nan"), best)
    tl.store(p_best + i_row * tiles + i_tile, best)


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
    scratch = _Scratch.empty(rows, vocab, tiles, logits.device)
    sampled = SampledTokens(torch.empty_like(slots), torch.empty_like(slots, dtype=torch.bool))
    if rows:
        _launch(logits, slots, positions, params, scratch, sampled, tiles)
    return sampled


@dataclass
class _Scratch:
    """What the kernels leave for one another."""

    scaled: Tensor  # f32[R, V]
    maxima: Tensor  # f32[R, tiles * GROUPS_PER_TILE]
    masses: Tensor  # i64[R, tiles]
    best: Tensor  # f32[R, tiles]
    best_id: Tensor  # i32[R, tiles]
    bound: Tensor  # f32[R]
    total: Tensor  # i64[R]
    count: Tensor  # i32[R]
    keys: Tensor  # i64[R, CAPACITY]

    @classmethod
    def empty(cls, rows: int, vocab: int, tiles: int, device: torch.device) -> "_Scratch":
        def of(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        return cls(
            scaled=of(torch.float32, vocab),
            maxima=of(torch.float32, tiles * GROUPS_PER_TILE),
            masses=of(torch.int64, tiles),
            best=of(torch.float32, tiles),
            best_id=of(torch.int32, tiles),
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
    filters_of = (p.temperature, p.top_k, p.top_p, p.min_p)
    padded = triton.next_power_of_2(tiles)
    stats_kernel[(rows, tiles)](
        *(logits, slots, positions, *filters_of),
        *(p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.seed),
        *(p.bias, p.has_bias, p.prompt_seen, p.output_counts, p.has_penalties),
        *(p.stop_ids, p.min_position),
        *(s.scaled, s.maxima, s.masses, s.best, s.best_id),
        *(logits.stride(0), tiles, vocab),
        num_warps=STATS_WARPS,
        enable_fp_fusion=False,  # x - (f * c + p) rounds as the reference does
    )
    bound_kernel[(rows,)](
        *(slots, *filters_of, s.maxima, s.masses, s.best, s.bound, s.total, s.count),
        *(tiles, vocab, padded),
        num_warps=bound_warps(padded),
    )
    gather_kernel[(rows, tiles)](
        *(slots, *filters_of, s.scaled, s.best, s.bound, s.count, s.keys, tiles, vocab),
        num_warps=GATHER_WARPS,
    )
    finish_kernel[(rows,)](
        *(slots, positions, *filters_of, p.seed, s.best, s.best_id, s.total, s.count, s.keys),
        *(sampled.token_ids, sampled.ok, tiles, padded),
        num_warps=FINISH_WARPS,
    )
    wide_kernel[(rows,)](
        *(slots, positions, *filters_of, p.seed, s.scaled, s.best, s.count),
        *(sampled.token_ids, sampled.ok, tiles, vocab, padded),
        num_warps=WIDE_WARPS,
    )
