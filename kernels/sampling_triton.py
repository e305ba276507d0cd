"""Sampling on the GPU: what `sampling.py` defines, in one sweep of the logits and a sparse second.

Launches, none of which waits for the host, whatever the rows ask for:

    stats    row x tile   the tile's best (score, id). For a row with filters instead its best
                          logit, the maxima of groups of 32, its mass and its moments. For a row
                          that will be scored, besides, the sum and the maxima for its logprobs
    bound    row          a value below which no token can survive the filters, from the maxima,
                          and the list of the groups that reach it
    gather   row x part   (value, id) of every token that reaches the bound, as one sortable key,
                          64 listed groups a program
    finish   row          no filter: the best of the tiles. Filters: the cuts among the keys, found
                          bit by bit, and the draw
    then of flat rows, those with more than CAPACITY candidates:
    count, bracket, sift, settle     `sampling_flat_triton.py`
    exhaust                          `sampling_exhaustive_triton.py`, for thousands of equal logits

Nothing of size [R, V] is written: who needs a logit again reads it again, through the same
`scaled_logits`. Programs leave a kernel at once that is not for their row, so rows without filters
pay for the first sweep only; where the caller knows that no row has any (`plain`), stats and finish
are all that is launched. A tile is 4096 tokens of the vocabulary whatever the batch; tiles are
combined by maxima, by integer sums and by sums in order, noise is a function of (seed, position,
id): nothing depends on R or on the row.

Example: a row of 128 Ki tokens with top_k = 50 leaves 4096 group maxima, 32 tiles and, of the 50th
greatest maximum as its bound, some 70 candidates in 50 groups: gather reads 1600 logits, 1.2 % of
the row, in one program.

Against the reference: exp and log are the device's own, so a draw can differ where two scores, or
a mass and a filter's target, lie within a few units in the last place.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.configs import UNFUSED
from millrace.kernels.edits_triton import (
    edited_logits,
    is_filtered,
    load_logits,
    temperature_factors,
)
from millrace.kernels.order_triton import NO_ID
from millrace.kernels.rng import CALLS_PER_TILE, TILE
from millrace.kernels.rng_triton import gumbel_tile
from millrace.kernels.rows_triton import LOGPROBS, TOP_N_SIGMA, asked, row_at, rows_of
from millrace.kernels.sampling import SampledTokens, SweepNotes, check_inputs
from millrace.kernels.sampling_exhaustive_triton import EXHAUST_OPTIONS, exhaust_kernel
from millrace.kernels.sampling_filters_triton import (
    GATHER_PARTS,
    GROUP,
    GROUPS_PER_TILE,
    KEY_ROOM,
    LISTED_GROUPS,
    PART_GROUPS,
    bound_kernel,
    bound_options,
    finish_kernel,
    gather_kernel,
    mass_of,
)
from millrace.kernels.sampling_flat_triton import (
    BINS,
    BLOCKS_PER_TILE,
    SUMS,
    bracket_kernel,
    count_kernel,
    settle_kernel,
    sift_kernel,
)
from millrace.kernels.slot_sampling import RAW_LOGPROBS, SlotSampling

MAX_VOCAB = 1 << 19
"""The group maxima of a row must fit the registers of one program."""
FLAT_PROGRAMS = 528
"""Programs that share the tiles of the flat rows, however many there are: a grid must be known
before the rows are. Four for each multiprocessor of an H100."""
STATS_OPTIONS, SCORED_OPTIONS = {"num_warps": 8, **UNFUSED}, {"num_warps": 16, **UNFUSED}
GATHER_OPTIONS = FINISH_OPTIONS = {"num_warps": 4, **UNFUSED}
FLAT_OPTIONS = {"num_warps": 8, **UNFUSED}
BRACKET_OPTIONS = {"num_warps": 16}
SETTLE_OPTIONS = {"num_warps": 16, **UNFUSED}
"""Warps per program: what compiles for every target without a spill, and no more; of the scored
sweep twice that, as eight take registers that would leave a multiprocessor half empty."""


_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_RAW = tl.constexpr(RAW_LOGPROBS)


@triton.jit
def _store_maxima(x, p_maxima):
    """Store the maxima of groups of 32 of a tile in the order of the noise; returns the tile's."""
    groups = tl.max(tl.reshape(x, (_CALLS // _GROUP, _GROUP, 4)), axis=1)  # [CALLS / 32, 4]
    o_group = tl.arange(0, 4)[None, :] * (_CALLS // _GROUP)
    o_group += tl.arange(0, _CALLS // _GROUP)[:, None]
    tl.store(p_maxima + o_group, groups)
    return tl.max(tl.max(groups, axis=1), axis=0)


@triton.jit
def _mass_of_tile(x, best):
    return tl.sum(tl.sum(mass_of(x, tl.maximum(best, _LOWEST)), axis=1), axis=0)


@triton.jit
def stats_kernel(
    rows,
    p_maxima,  # f32[R, tiles * GROUPS], written for rows with filters
    p_mass,  # i64[R, tiles], relative to the tile's maximum, likewise
    p_least,  # f32[R, tiles], its least finite logit, likewise
    p_moments,  # f64[R, 3, tiles]: finite logits, their sum and that of squares; for top-n-sigma
    p_best,  # f32[R, tiles], the tile's best score; NaN if it holds one
    p_best_id,  # i32[R, tiles]
    p_note_maxima,  # f32[R, tiles * GROUPS], see SweepNotes; written for rows to be scored
    p_note_best,  # f32[R, tiles], likewise
    p_note_mass,  # i64[R, tiles], likewise
    tiles,
    SCORED: tl.constexpr,  # whether any row will be scored
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_at(rows, i_row)
    o_vocab = (  # [CALLS, 4], the order of the noise
        i_tile * _TILE + tl.arange(0, 4)[None, :] * _CALLS + tl.arange(0, _CALLS)[:, None]
    )
    raw = load_logits(row, o_vocab, o_vocab < rows.vocab)
    x = edited_logits(row, raw, o_vocab, o_vocab < rows.vocab)
    has_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    samples, _, after = temperature_factors(row)
    o_out = i_row * tiles + i_tile
    if SCORED:
        kind = asked(row, LOGPROBS)
        if kind > 0:
            y = tl.where(kind == _RAW, raw, x * after)
            best = _store_maxima(y, p_note_maxima + o_out * _GROUPS)
            tl.store(p_note_mass + o_out, _mass_of_tile(y, best))
            odd = tl.max(tl.max((y != y).to(tl.int32), axis=1), axis=0) != 0
            tl.store(p_note_best + o_out, tl.where(odd, float("nan"), best))
    score = x
    if is_filtered(row):
        best = _store_maxima(x, p_maxima + o_out * _GROUPS)
        tl.store(p_mass + o_out, _mass_of_tile(x, best))
        finite = x > float("-inf")
        least = tl.min(tl.min(tl.where(finite, x, float("inf")), axis=1), axis=0)
        tl.store(p_least + o_out, least)
        if asked(row, TOP_N_SIGMA) > 0:
            wide = tl.where(finite, x, 0.0).to(tl.float64)
            p_out = p_moments + i_row * 3 * tiles + i_tile
            count = tl.sum(tl.sum(finite.to(tl.int32), axis=1), axis=0)
            tl.store(p_out, count.to(tl.float64))
            tl.store(p_out + tiles, tl.sum(tl.sum(wide, axis=1), axis=0))
            tl.store(p_out + 2 * tiles, tl.sum(tl.sum(wide * wide, axis=1), axis=0))
    elif samples:
        score = x * after + gumbel_tile(row.seed, row.position, i_tile)
    best = tl.max(tl.max(score, axis=1), axis=0)
    winners = tl.where(score == best, o_vocab, NO_ID)
    tl.store(p_best_id + o_out, tl.min(tl.min(winners, axis=1), axis=0))
    tl.store(p_best + o_out, tl.where(has_nan != 0, float("nan"), best))


def sample_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    scored: bool = False,
    plain: bool = False,
) -> SampledTokens:
    """As `sample_reference`, on the device; never waits for it. Logits may have any row stride.

    `scored` where `drawn_logprobs_triton` is to follow: the sweep then takes notes for it. `plain`
    where no row has a filter, which is not checked: two launches then do the work of nine.
    """
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
        notes=_empty_notes(rows, tiles if scored else 0, logits.device),
    )
    if rows:
        launch = _Launch(logits, slots, positions, params, scratch, sampled, scored)
        launch.first_sweep()
        if not plain:
            launch.short_lists()
        launch.finish()
        if not plain:
            launch.flat_rows()
    return sampled


def _empty_notes(rows: int, tiles: int, device: torch.device) -> SweepNotes:
    return SweepNotes(
        kept=torch.empty(rows, 4, dtype=torch.int64, device=device),
        maxima=torch.empty(rows, tiles * GROUPS_PER_TILE, device=device),
        best=torch.empty(rows, tiles, device=device),
        mass=torch.empty(rows, tiles, dtype=torch.int64, device=device),
    )


@dataclass
class _Scratch:
    """What the kernels leave for one another."""

    maxima: Tensor  # f32[R, tiles * GROUPS_PER_TILE]
    masses: Tensor  # i64[R, tiles]
    least: Tensor  # f32[R, tiles]
    moments: Tensor  # f64[R, 3, tiles]
    best: Tensor  # f32[R, tiles]
    best_id: Tensor  # i32[R, tiles]
    floor: Tensor  # f32[R]
    bound: Tensor  # f32[R]
    total: Tensor  # i64[R]
    groups: Tensor  # i32[R, LISTED_GROUPS]
    num_groups: Tensor  # i32[R]
    count: Tensor  # i32[R]
    keys: Tensor  # i64[R, KEY_ROOM]
    flat: Tensor  # i32[1 + R]: how many rows are flat, and which
    span: Tensor  # f32[R, 2]: a flat row's best logit, the width of its bins
    bins: Tensor  # i32[R, BINS]
    fates: Tensor  # i8[R, BINS]
    sums: Tensor  # i64[R, SUMS]
    certain_score: Tensor  # f32[R, tiles * BLOCKS_PER_TILE]
    certain_id: Tensor  # i32[R, tiles * BLOCKS_PER_TILE]
    certain_low: Tensor  # i64[R, tiles * BLOCKS_PER_TILE]
    certain_top: Tensor  # f32[R, tiles * BLOCKS_PER_TILE]

    @classmethod
    def empty(cls, rows: int, tiles: int, device: torch.device) -> "_Scratch":
        def of(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        blocks = tiles * BLOCKS_PER_TILE
        return cls(
            maxima=of(torch.float32, tiles * GROUPS_PER_TILE),
            masses=of(torch.int64, tiles),
            least=of(torch.float32, tiles),
            moments=of(torch.float64, 3, tiles),
            best=of(torch.float32, tiles),
            best_id=of(torch.int32, tiles),
            floor=of(torch.float32),
            bound=of(torch.float32),
            total=of(torch.int64),
            groups=of(torch.int32, LISTED_GROUPS),
            num_groups=of(torch.int32),
            count=of(torch.int32),
            keys=of(torch.int64, KEY_ROOM),
            flat=torch.empty(1 + rows, dtype=torch.int32, device=device),
            span=of(torch.float32, 2),
            bins=of(torch.int32, BINS),
            fates=of(torch.int8, BINS),
            sums=of(torch.int64, SUMS),
            certain_score=of(torch.float32, blocks),
            certain_id=of(torch.int32, blocks),
            certain_low=of(torch.int64, blocks),
            certain_top=of(torch.float32, blocks),
        )


class _Launch:
    """One call's launches. Without fused multiply-adds x * after + noise and x - (f * c + p) round
    as in the reference."""

    def __init__(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        params: SlotSampling,
        scratch: _Scratch,
        sampled: SampledTokens,
        scored: bool,
    ) -> None:
        assert sampled.notes is not None, "allocated with the tokens"
        self.rows = logits.shape[0]
        self.tiles = scratch.best.shape[1]
        self.padded = triton.next_power_of_2(self.tiles)
        self.scratch, self.notes, self.scored = scratch, sampled.notes, scored
        self.inputs = rows_of(logits, slots, positions, params)
        self.answer, self.ok = (sampled.token_ids, self.notes.kept), sampled.ok

    def first_sweep(self) -> None:
        s, notes = self.scratch, self.notes
        stats_kernel[(self.rows, self.tiles)](
            *(self.inputs, s.maxima, s.masses, s.least, s.moments, s.best, s.best_id),
            *(notes.maxima, notes.best, notes.mass, self.tiles),
            SCORED=self.scored,
            **(SCORED_OPTIONS if self.scored else STATS_OPTIONS),
        )

    def short_lists(self) -> None:
        s = self.scratch
        bound_kernel[(self.rows,)](
            *(self.inputs, s.maxima, s.masses, s.moments, s.best, s.floor, s.bound, s.total),
            *(s.groups, s.num_groups, s.count, s.flat, self.tiles, self.padded),
            **bound_options(self.padded),
        )
        parts = min(GATHER_PARTS, self.tiles * GROUPS_PER_TILE // PART_GROUPS)
        gather_kernel[(self.rows, parts)](
            *(self.inputs, s.bound, s.groups, s.num_groups, s.count, s.keys),
            **GATHER_OPTIONS,
        )

    def finish(self) -> None:
        s = self.scratch
        finish_kernel[(self.rows,)](
            *(self.inputs, s.best, s.best_id, s.least, s.floor, s.bound, s.total, s.count, s.keys),
            *(self.ok, *self.answer, s.flat, s.span, s.bins, s.sums, self.tiles, self.padded),
            *(BINS, SUMS),
            **FINISH_OPTIONS,
        )

    def flat_rows(self) -> None:
        s, few = self.scratch, min(FLAT_PROGRAMS, self.rows * self.tiles)
        count_kernel[(few,)](
            *(self.inputs, s.best, s.bound, s.flat, s.span, s.bins, self.tiles),
            **FLAT_OPTIONS,
        )
        bracket_kernel[(self.rows,)](
            *(self.inputs, s.bound, s.total, s.count, s.flat, s.span, s.bins, s.fates, s.sums),
            **BRACKET_OPTIONS,
        )
        certain = (s.certain_score, s.certain_id, s.certain_low, s.certain_top)
        sift_kernel[(few,)](
            *(self.inputs, s.bound, s.count, s.keys, s.flat, s.span, s.fates, s.sums, *certain),
            self.tiles,
            **FLAT_OPTIONS,
        )
        settle_kernel[(self.rows,)](
            *(self.inputs, s.total, s.count, s.keys, s.flat, s.span, s.sums, *certain),
            *(*self.answer, self.tiles, self.padded),
            **SETTLE_OPTIONS,
        )
        exhaust_kernel[(self.rows,)](
            *(self.inputs, s.bound, s.total, s.count, s.flat, s.span, *self.answer),
            **EXHAUST_OPTIONS,
        )
