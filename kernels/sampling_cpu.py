"""Sampling on the CPU: the tokens of `sample_reference`, in a fraction of the time.

Rows are told apart by what they need. Greedy rows cost an argmax; rows with only a temperature
cost the noise and an argmax; rows with filters find their head through group maxima
(`candidates.py`) and take noise for the survivors alone. Whatever is rare and odd (an infinite
logit, a NaN) goes to the reference's own code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.candidates import (
    argmax_rows,
    at_least,
    group_maxima,
    sorted_rows,
    top_k_bounds,
)
from millrace.kernels.logprobs import MASS_ONE, raw_logprobs_cpu
from millrace.kernels.rng import gumbel_noise, gumbel_noise_at
from millrace.kernels.sampling import (
    GREEDY_BELOW,
    SampledTokens,
    attach_logprobs,
    check_inputs,
    draw_from_row,
    edit_row,
    fixed_point_mass,
)
from millrace.kernels.slot_sampling import SlotSampling

_ROWS_AT_ONCE = 4  # rows whose temporaries over the vocabulary stay in the cache
_NARROW = 2048  # candidates up to which rows share one table; a wider row gets its own
_BOUND_SLACK = 1e-3  # lowers a bound made with exp and ln, by far more than they round


def sample_cpu(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    num_top: int = 0,
    want_logprobs: bool = False,
) -> SampledTokens:
    """As `sample_reference`: same arguments, same tokens. IndexError if a slot is not in [0, S)."""
    check_inputs(logits, slots, positions, params)
    logits = logits.contiguous()
    greedy = params.temperature[slots] < GREEDY_BELOW
    filtered = (params.top_k[slots] > 0) | (params.top_p[slots] < 1) | (params.min_p[slots] > 0)
    token_ids = torch.zeros_like(slots)
    best = torch.zeros(slots.shape[0])
    for sampler, wanted in (
        (_greedy, greedy),
        (_unfiltered, ~greedy & ~filtered),
        (_filtered, ~greedy & filtered),
    ):
        rows = wanted.nonzero().squeeze(1)
        if rows.shape[0]:
            token_ids[rows], best[rows] = sampler(logits, rows, slots, positions, params)
    ok = torch.ones_like(greedy)
    for i_row in (~best.isfinite()).nonzero().squeeze(1).tolist():
        slot, position = int(slots[i_row]), int(positions[i_row])
        row = edit_row(logits[i_row].to(torch.float32, copy=True), slot, position, params)
        token_id = draw_from_row(row, slot, position, params)
        token_ids[i_row], ok[i_row] = token_id or 0, token_id is not None
    sampled = SampledTokens(token_ids, ok)
    if want_logprobs:
        attach_logprobs(sampled, raw_logprobs_cpu(logits, token_ids, num_top))
    return sampled


Head = tuple[Tensor, Tensor, Tensor]
"""What `at_least` returns: row i64[N], id i64[N], value f32[N], by row, then id."""


# Each of the three: the batch and the rows i64[N] to sample -> (token ids i64[N], f32[N] whose
# value is finite where the row is an ordinary one).


def _greedy(
    logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
) -> tuple[Tensor, Tensor]:
    best, ids = argmax_rows(_edited(logits, rows, slots, positions, params))
    return ids, best.float()


def _unfiltered(
    logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
) -> tuple[Tensor, Tensor]:
    best, ids = [], []
    for part, scaled in _scaled(logits, rows, slots, positions, params):
        scores = gumbel_noise(params.seed[slots[part]], positions[part], logits.shape[1])
        block_best, block_ids = argmax_rows(scores.add(scaled))
        best.append(block_best)
        ids.append(block_ids)
    return torch.cat(ids), torch.cat(best)


def _filtered(
    logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
) -> tuple[Tensor, Tensor]:
    best, totals, heads = [], [], []
    for i_block, (part, scaled) in enumerate(_scaled(logits, rows, slots, positions, params)):
        maxima = group_maxima(scaled)
        best.append(maxima.amax(1))
        total, bounds = _head_bounds(scaled, maxima, best[-1], slots[part], params)
        totals.append(total)
        row, head_ids, values = at_least(scaled, maxima, bounds)
        heads.append((row + i_block * _ROWS_AT_ONCE, head_ids, values))
    best_of, total_of = torch.cat(best), torch.cat(totals)
    ids = torch.zeros_like(rows)
    for group, head in _split_by_width(rows.shape[0], heads):
        at = rows[group]
        table = sorted_rows(group.shape[0], *head)
        ids[group] = _draw(
            *table, best_of[group], total_of[group], slots[at], positions[at], params
        )
    return ids, best_of


def _split_by_width(rows: int, heads: list[Head]) -> Iterator[tuple[Tensor, Head]]:
    """The narrow rows together and each wide row alone: (i64[G] rows, their head, rows from 0)."""
    row, ids, values = (torch.cat(parts) for parts in zip(*heads, strict=True))
    counts = torch.bincount(row, minlength=rows)
    if int(counts.max()) <= _NARROW:
        yield torch.arange(rows), (row, ids, values)
        return
    is_narrow = counts <= _NARROW
    narrow = is_narrow.nonzero().squeeze(1)
    if narrow.shape[0]:
        inside = is_narrow[row]
        renumbered = (is_narrow.cumsum(0) - 1)[row[inside]]
        yield narrow, (renumbered, ids[inside], values[inside])
    ends = counts.cumsum(0)
    for i_row in (~is_narrow).nonzero().squeeze(1):
        part = slice(int(ends[i_row] - counts[i_row]), int(ends[i_row]))
        yield i_row.view(1), (torch.zeros_like(ids[part]), ids[part], values[part])


def _head_bounds(
    scaled: Tensor, maxima: Tensor, best: Tensor, slots: Tensor, params: SlotSampling
) -> tuple[Tensor, Tensor]:
    """(total mass i64[R], bound f32[R]) of each row; no value below the bound survives a filter.

    The total is the row's own where top-p stands alone, else 0: then the head will tell it.
    """
    top_k, top_p = params.top_k[slots].long(), params.top_p[slots]
    total = torch.zeros_like(top_k)
    bounds = torch.full_like(best, -torch.inf)
    if (top_k > 0).any():
        bounds = top_k_bounds(maxima, top_k.clamp(min=1)).where(top_k > 0, bounds)
    for i in ((top_k == 0) & (top_p < 1)).nonzero().squeeze(1).tolist():
        total[i] = fixed_point_mass(scaled[i], best[i]).sum()
        bounds[i] = _top_p_bound(maxima[i], best[i], total[i], top_p[i], scaled.shape[1])
    # Where top-k and top-p both cut, top-p needs all of top-k's mass: no short cut for min-p then.
    min_p_bounds = best + params.min_p[slots].log()
    return total, bounds.maximum(min_p_bounds.where((top_k == 0) | (top_p == 1), bounds))


def _top_p_bound(maxima: Tensor, best: Tensor, total: Tensor, top_p: Tensor, vocab: int) -> Tensor:
    """A value at or above which a row's tokens weigh top_p of `total`, all scalars but maxima.

    The greatest group maxima, best first, until they alone weigh that much. Should all of them
    not: tokens lighter than 1/V of what may be left out cannot together weigh more than that.
    """
    target = _top_p_target(top_p, total)
    heads = maxima.sort(descending=True).values
    reached = fixed_point_mass(heads, best).cumsum(0) >= target
    if reached[-1]:
        return heads[reached.byte().argmax()]
    spare = (total - target).double() / MASS_ONE / vocab
    return best + spare.log().float() - _BOUND_SLACK


def _draw(
    values: Tensor,
    ids: Tensor,
    best: Tensor,
    total: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
) -> Tensor:
    """Cut a table of candidates [R, C] in best-first order and draw one of each row: i64[R]."""
    top_k, top_p = params.top_k[slots].long(), params.top_p[slots]
    column = torch.arange(values.shape[1])
    kept = values > -torch.inf
    kept &= (column < top_k.unsqueeze(1)) | (top_k == 0).unsqueeze(1)
    masses = fixed_point_mass(values, best.unsqueeze(1)) * kept
    total = masses.sum(1).where(top_k > 0, total)
    before = masses.cumsum(1) - masses
    target = _top_p_target(top_p, total).unsqueeze(1)
    kept &= (before < target) | (top_p == 1).unsqueeze(1)
    kept &= values >= (best + params.min_p[slots].log()).unsqueeze(1)
    width = max(1, int(kept.sum(1).max()))
    values, ids, kept = values[:, :width], ids[:, :width], kept[:, :width]
    scores = values + gumbel_noise_at(params.seed[slots], positions, ids)
    scores.masked_fill_(~kept, -torch.inf)
    winners = scores == scores.amax(1, keepdim=True)
    return ids.masked_fill(~winners, params.vocab).amin(1)  # the lowest id of equal scores


def _top_p_target(top_p: Tensor, total: Tensor) -> Tensor:
    """`sampling.top_p_target` of tensors: f32[...], i64[...] -> i64[...]."""
    target = (top_p.double() * total.double()).ceil().to(torch.int64)
    return target.minimum(total).clamp(min=1)


def _scaled(
    logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the rows: (their indices i64[B], edited and tempered logits f32[B, V])."""
    for part in rows.split(_ROWS_AT_ONCE):
        edited = _edited(logits, part, slots, positions, params)
        inverse = 1.0 / params.temperature[slots[part]]
        yield part, edited.float() * inverse.unsqueeze(1)


def _edited(
    logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
) -> Tensor:
    """The given rows after all edits. The logits themselves if these are all of the rows and none
    has an edit; a copy otherwise."""
    all_rows = rows.shape[0] == logits.shape[0]
    edits = params.has_bias | params.has_penalties
    wanted = edits[slots[rows]] | (positions[rows] < params.min_position[slots[rows]])
    if not wanted.any():
        return logits if all_rows else logits[rows]
    x = logits.to(torch.float32, copy=True) if all_rows else logits[rows].float()
    for i in wanted.nonzero().squeeze(1).tolist():
        edit_row(x[i], int(slots[rows[i]]), int(positions[rows[i]]), params)
    return x
