"""Logprobs on the GPU, of drawn tokens and of prompts.

Of a drawn token they cost no sweep: `stats_kernel` of `sampling_triton.py` has summed the row up
and noted the maxima of its groups of 32 (`SweepNotes`). What is left to be read are the groups that
hold logits above the chosen one, for its rank; the groups that hold the best tokens; and, if the
distribution was filtered, those that hold survivors:

    pick     row          which groups these are, from the noted maxima; the chosen token's logit
    part     row x part   128 of them: logits above the chosen one, the num_top best tokens as
                          sortable keys, and maximum and mass of the survivors of filters
    merge    row          combines the parts

The best n tokens of a row lie in the n groups of the greatest maxima. Tokens 0 to 63 are read in
any case: where fewer than num_top tokens are possible at all, the impossible ones of the lowest ids
follow, and those are among them.

Prompt tokens have no sampler before them: one sweep by tiles in place of pick and part, then the
same merge. `logprobs.py` and `drawn_logprobs.py` have the definitions. A tile is 4096 tokens
whatever the batch, masses are integers: a row's result does not depend on its neighbours.
"""

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
from millrace.kernels.logprobs import MASS_ONE, MAX_TOP, RawLogprobs, check_logprob_inputs
from millrace.kernels.order_triton import (
    SIGN,
    key_id,
    key_of,
    key_value,
    load_kept,
    order_of,
    survives,
    value_of,
)
from millrace.kernels.rng import TILE
from millrace.kernels.rows_triton import LOGPROBS, asked, row_at, rows_of
from millrace.kernels.sampling import SampledTokens, check_inputs
from millrace.kernels.sampling_filters_triton import (
    GROUP,
    GROUPS_PER_TILE,
    bound_options,
    head,
    list_groups,
    mass_of,
)
from millrace.kernels.slot_sampling import PROCESSED_LOGPROBS, SlotSampling

OPTIONS = {"num_warps": 8}
PART_OPTIONS = {"num_warps": 16, **UNFUSED}


def pick_options(tiles: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """The warps of the sampler's bound: both hold the group maxima of `tiles` tiles."""
    return {**bound_options(tiles, amd), **UNFUSED}


_TILE = tl.constexpr(TILE)
_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS_PER_TILE)
_TOP_GROUPS = tl.constexpr(MAX_TOP // GROUP)
_MASS_ONE = tl.constexpr(MASS_ONE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_PROCESSED = tl.constexpr(PROCESSED_LOGPROBS)


@triton.jit
def _scored_logits(row, kind, kept, o_vocab, m_vocab):
    """The logits that a row is scored by: the model's, or as the draw saw them."""
    y = load_logits(row, o_vocab, m_vocab)
    if kind == _PROCESSED:
        x = edited_logits(row, y, o_vocab, m_vocab)
        _, _, after = temperature_factors(row)
        y = tl.where(survives(key_of(x, o_vocab), x, kept), x * after, float("-inf"))
    return y


@triton.jit
def _score_part(y, o_vocab, m_vocab, chosen, o_out, p_above, p_keys, num_top):
    """Count the logits y [N] above the chosen one, and store the keys of the best."""
    tl.store(p_above + o_out, tl.sum((y > chosen).to(tl.int32), axis=0))
    keys = tl.where(m_vocab, key_of(y, o_vocab), -1)
    for i_top in range(num_top):
        top_key = tl.max(keys, axis=0)
        tl.store(p_keys + o_out * num_top + i_top, top_key)
        keys = tl.where(keys == top_key, -1, keys)


@triton.jit
def _store_mass(y, o_out, p_best, p_mass):
    best = tl.max(y, axis=0)
    tl.store(p_mass + o_out, tl.sum(mass_of(y, tl.maximum(best, _LOWEST)), axis=0))
    has_nan = tl.max((y != y).to(tl.int32), axis=0) != 0
    tl.store(p_best + o_out, tl.where(has_nan, float("nan"), best))


@triton.jit
def raw_tile_kernel(
    p_logits,
    p_token_ids,
    p_best,  # f32[R, tiles], NaN if the tile holds one
    p_mass,  # i64[R, tiles], relative to it
    p_above,  # i32[R, tiles]
    p_keys,  # i64[R, tiles, num_top], best first; -1 where the tile has no more
    p_chosen,  # f32[R]
    stride_logits,
    tiles,
    vocab,
    num_top,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_logits + i_row * stride_logits
    o_vocab = i_tile * _TILE + tl.arange(0, _TILE)
    m_vocab = o_vocab < vocab
    y = tl.load(p_row + o_vocab, mask=m_vocab, other=float("-inf")).to(tl.float32)
    chosen = tl.load(p_row + tl.load(p_token_ids + i_row)).to(tl.float32)
    tl.store(p_chosen + i_row, chosen, mask=i_tile == 0)
    o_out = i_row * tiles + i_tile
    _store_mass(y, o_out, p_best, p_mass)
    _score_part(y, o_vocab, m_vocab, chosen, o_out, p_above, p_keys, num_top)


@triton.jit
def pick_kernel(
    rows,
    p_kept,
    p_note_maxima,
    p_note_best,
    p_token_ids,
    p_groups,  # i32[R, tiles * GROUPS], those to be read
    p_num_groups,  # i32[R], 0 of rows that nobody asked to score
    p_chosen,  # f32[R], NaN where the row has no logprobs
    tiles,
    num_top,
    TILES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = row_at(rows, i_row)
    kind = asked(row, LOGPROBS)
    tl.store(p_num_groups + i_row, 0)
    tl.store(p_chosen + i_row, float("nan"))
    if kind > 0:
        kept = load_kept(p_kept + i_row * 4)
        o_tile, o_group = tl.arange(0, TILES), tl.arange(0, TILES * _GROUPS)
        bests = tl.load(p_note_best + i_row * tiles + o_tile, mask=o_tile < tiles, other=_LOWEST)
        odd = tl.max(((bests != bests) | (bests == float("inf"))).to(tl.int32), axis=0) != 0
        o_chosen = tl.arange(0, 1) + tl.load(p_token_ids + i_row).to(tl.int32)
        chosen = tl.max(_scored_logits(row, kind, kept, o_chosen, o_chosen < rows.vocab), axis=0)
        tl.store(p_chosen + i_row, tl.where(odd, float("nan"), chosen))
        maxima = tl.load(
            p_note_maxima + i_row * tiles * _GROUPS + o_group,
            mask=o_group < tiles * _GROUPS,
            other=float("-inf"),
        )
        least = chosen
        if (kind == _PROCESSED) & is_filtered(row):
            _, _, after = temperature_factors(row)
            least = key_value(kept[0]) * after
        elif num_top > 0:
            # As many groups as tokens are asked for; all, if there are not as many.
            orders = order_of(maxima).to(tl.int64) + SIGN
            found = head(orders, tl.full((), 1, tl.int64), 0, num_top, 32)
            bound = tl.where(found > 0, value_of((found - SIGN).to(tl.int32)), float("-inf"))
            least = tl.minimum(chosen, bound)
        m_group = (maxima >= least) | (o_group < _TOP_GROUPS)
        p_list = p_groups + i_row * tiles * _GROUPS
        tl.store(p_num_groups + i_row, list_groups(p_list, m_group, TILES * _GROUPS))


@triton.jit
def part_kernel(
    rows,
    p_kept,
    p_note_best,
    p_note_mass,
    p_groups,
    p_num_groups,
    p_best,
    p_mass,
    p_above,
    p_keys,
    p_chosen,
    tiles,
    num_top,
):
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_at(rows, i_row)
    kind, num_groups = asked(row, LOGPROBS), tl.load(p_num_groups + i_row)
    filtered = (kind == _PROCESSED) & is_filtered(row)
    o_out = i_row * tiles + i_part
    if kind > 0:
        tl.store(p_above + o_out, 0)
        best, mass = tl.load(p_note_best + o_out), tl.load(p_note_mass + o_out)
        tl.store(p_best + o_out, tl.where(filtered, float("-inf"), best))
        tl.store(p_mass + o_out, tl.where(filtered, 0, mass))
    if i_part * _GROUPS < num_groups:
        o_listed = i_part * _GROUPS + tl.arange(0, _TILE) // _GROUP
        m_listed = o_listed < num_groups
        groups = tl.load(p_groups + i_row * tiles * _GROUPS + o_listed, mask=m_listed, other=0)
        o_vocab = groups * _GROUP + tl.arange(0, _TILE) % _GROUP
        m_vocab = m_listed & (o_vocab < rows.vocab)
        y = _scored_logits(row, kind, load_kept(p_kept + i_row * 4), o_vocab, m_vocab)
        y = tl.where(m_vocab, y, float("-inf"))
        if filtered:
            _store_mass(y, o_out, p_best, p_mass)
        chosen = tl.load(p_chosen + i_row)
        _score_part(y, o_vocab, m_vocab, chosen, o_out, p_above, p_keys, num_top)
    else:
        for i_top in range(num_top):
            tl.store(p_keys + o_out * num_top + i_top, tl.full((), -1, tl.int64))


@triton.jit
def merge_kernel(
    p_best,
    p_mass,
    p_above,
    p_keys,
    p_chosen,
    p_logprobs,  # f32[R], NaN where `chosen` is
    p_ranks,  # i64[R]
    p_top_ids,  # i64[R, num_top]
    p_top_logprobs,  # f32[R, num_top]
    tiles,
    num_top,
    TILES: tl.constexpr,  # tiles rounded up to a power of two
    KEYS: tl.constexpr,  # tiles * num_top, likewise
):
    i_row = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tiles
    chosen = tl.load(p_chosen + i_row)
    bests = tl.load(p_best + i_row * tiles + o_tile, mask=m_tile, other=float("-inf"))
    best = tl.max(bests, axis=0)
    odd = tl.max(((bests != bests) | (bests == float("inf"))).to(tl.int32), axis=0) != 0
    ordinary = (chosen == chosen) & (best > float("-inf"))
    best = tl.where(ordinary & (odd == 0), best, float("nan"))
    masses = tl.load(p_mass + i_row * tiles + o_tile, mask=m_tile, other=0).to(tl.float64)
    share = tl.exp(tl.maximum(bests, _LOWEST).to(tl.float64) - best.to(tl.float64))
    log_sum = tl.log(tl.sum(masses * share, axis=0) / _MASS_ONE).to(tl.float32)
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
    partial = _partial(logits, num_top)
    (rows, vocab), tiles = logits.shape, triton.cdiv(logits.shape[1], TILE)
    if rows:
        raw_tile_kernel[(rows, tiles)](
            *(logits, token_ids, *partial, logits.stride(0), tiles, vocab, num_top),
            **OPTIONS,
        )
    return _merge(partial, num_top)


def drawn_logprobs_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    """As `drawn_logprobs_reference`, of what `sample_triton` has sampled with `scored`."""
    check_inputs(logits, slots, positions, params)
    check_logprob_inputs(logits, sampled.token_ids, num_top)
    rows, tiles = logits.shape[0], triton.cdiv(logits.shape[1], TILE)
    notes = sampled.notes
    if notes is None or notes.best.shape[1] != tiles:
        raise ValueError("sampled: expected what sample_triton returns if `scored`, got no notes")
    partial = _partial(logits, num_top)
    chosen, device = partial[-1], logits.device
    groups = torch.empty(rows, tiles * GROUPS_PER_TILE, dtype=torch.int32, device=device)
    num_groups = torch.empty(rows, dtype=torch.int32, device=device)
    inputs = rows_of(logits, slots, positions, params)
    padded = triton.next_power_of_2(tiles)
    if rows:  # without fused multiply-adds, for the sampler's bits
        pick_kernel[(rows,)](
            *(inputs, notes.kept, notes.maxima, notes.best, sampled.token_ids, groups),
            *(num_groups, chosen, tiles, num_top, padded),
            **pick_options(padded),
        )
        part_kernel[(rows, tiles)](
            *(inputs, notes.kept, notes.best, notes.mass, groups, num_groups, *partial),
            *(tiles, num_top),
            **PART_OPTIONS,
        )
    return _merge(partial, num_top)


def _partial(logits: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """What the tiles or parts leave for the rows: best, mass, above, keys, chosen."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected a last stride of 1, got {logits.stride(1)}")
    rows, tiles = logits.shape[0], triton.cdiv(logits.shape[1], TILE)

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    masses, keys = of(torch.int64, tiles), of(torch.int64, tiles, num_top)
    above, chosen = of(torch.int32, tiles), of(torch.float32)
    return of(torch.float32, tiles), masses, above, keys, chosen


def _merge(partial: tuple[Tensor, ...], num_top: int) -> RawLogprobs:
    (rows, tiles), device = partial[0].shape, partial[0].device
    scored = RawLogprobs(
        logprobs=torch.empty(rows, device=device),
        ranks=torch.empty(rows, dtype=torch.int64, device=device),
        top_ids=torch.empty(rows, num_top, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(rows, num_top, device=device),
    )
    if rows:
        merge_kernel[(rows,)](
            *(*partial, scored.logprobs, scored.ranks, scored.top_ids, scored.top_logprobs),
            *(tiles, num_top, triton.next_power_of_2(tiles)),
            triton.next_power_of_2(max(1, tiles * num_top)),
            **OPTIONS,
        )
    return scored
