"""Sampling on the CPU: the tokens of `sample_reference`, in a fraction of the time.

Rows are told apart by what they need. Greedy rows cost an argmax; rows with only a temperature
cost the noise and an argmax; rows with filters find their head through group maxima
(`candidates.py`) and take noise for the survivors alone. What is rare (top-n-sigma, typical-p, XTC)
goes row by row through `sampling_rare_cpu.py`, what is odd (an infinite logit, a NaN) to the
reference's own code.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.candidates import (
    argmax_rows,
    at_least,
    group_maxima,
    sorted_rows,
    top_k_bounds,
)
from millrace.kernels.filters import fixed_point_mass
from millrace.kernels.rng import WORDS, gumbel_noise, gumbel_noise_at
from millrace.kernels.sampling import (
    GREEDY_BELOW,
    SampledTokens,
    check_inputs,
    draw_from_row,
    edit_row,
    filters_of,
)
from millrace.kernels.sampling_rare_cpu import kept_of_row, top_p_bound
from millrace.kernels.slot_sampling import NO_FILTERS, SlotSampling

_BLOCK_VALUES = 1 << 20  # logits worked on at a time: 4 MiB of float32, for the last-level cache
_NARROW = 2048  # candidates up to which rows share one table; a wider row gets its own


def sample_cpu(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    scored: bool = False,
    plain: bool = False,
) -> SampledTokens:
    """As `sample_reference`: same arguments, same tokens. IndexError if a slot is not in [0, S)."""
    check_inputs(logits, slots, positions, params)
    batch = _Rows(logits.contiguous(), slots, positions, params)
    greedy, kind = batch.of("temperature") < GREEDY_BELOW, batch.of("filter_kind")
    rare = (batch.of("top_n_sigma") > 0) | (batch.of("typical_p") < 1)
    rare |= batch.of("xtc_probability") > 0
    token_ids = torch.zeros_like(slots)
    best = torch.full((slots.shape[0],), torch.nan)  # where it stays, no sampler took the row
    for sampler, wanted in (
        (_greedy, greedy),
        (_unfiltered, (kind == NO_FILTERS) & ~greedy),
        (_filtered, (kind != NO_FILTERS) & ~rare & ~greedy),
        (_rare, rare & ~greedy),
    ):
        rows = wanted.nonzero().squeeze(1)
        if rows.shape[0]:
            token_ids[rows], best[rows] = sampler(batch.take(rows))
    ok = torch.ones_like(greedy)
    for i_row in (~best.isfinite()).nonzero().squeeze(1).tolist():
        slot, position = int(slots[i_row]), int(positions[i_row])
        row = edit_row(logits[i_row].to(torch.float32, copy=True), slot, position, params)
        token_id = draw_from_row(row, slot, position, params)
        token_ids[i_row], ok[i_row] = token_id or 0, token_id is not None
    return SampledTokens(token_ids, ok)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch."""

    logits: Tensor  # f32|bf16|f16[R, V], contiguous
    slots: Tensor  # i64[R]
    positions: Tensor  # i64[R]
    params: SlotSampling

    def of(self, name: str) -> Tensor:
        """A parameter by row."""
        parameter: Tensor = getattr(self.params, name)
        return parameter.index_select(0, self.slots)

    def take(self, rows: Tensor) -> "_Rows":
        """The rows i64[N], ascending: copied, unless they are all there are."""
        if rows.shape[0] == self.slots.shape[0]:
            return self
        slots, positions = self.slots.index_select(0, rows), self.positions.index_select(0, rows)
        return _Rows(self.logits.index_select(0, rows), slots, positions, self.params)

    def take_one(self, i_row: int) -> "_Rows":
        """One row, not copied."""
        one = slice(i_row, i_row + 1)
        return _Rows(self.logits[one], self.slots[one], self.positions[one], self.params)

    def blocks(self) -> Iterator["_Rows"]:
        """The same rows, a few at a time."""
        few = max(1, _BLOCK_VALUES // self.params.vocab)
        parts = (t.split(few) for t in (self.logits, self.slots, self.positions))
        for logits, slots, positions in zip(*parts, strict=True):
            yield _Rows(logits, slots, positions, self.params)

    def edited(self) -> Tensor:
        """Steps 1 to 5: the logits themselves if no row has an edit, else a copy f32[R, V]."""
        wanted = self.of("has_bias") | self.of("has_bans") | self.of("has_penalties")
        wanted |= self.positions < self.of("min_position")
        if not wanted.any():
            return self.logits
        x = self.logits.to(torch.float32, copy=True)
        for i_row in wanted.nonzero().squeeze(1).tolist():
            edit_row(x[i_row], int(self.slots[i_row]), int(self.positions[i_row]), self.params)
        return x

    def factors(self) -> tuple[Tensor, Tensor]:
        """`temperature_factors` of rows that sample: before and after the filters, f32[R]."""
        inverse, last = 1.0 / self.of("temperature"), self.of("temperature_last") > 0
        return inverse.masked_fill(last, 1.0), inverse.masked_fill(~last, 1.0)

    def measured(self) -> Tensor:
        """The logits as the filters see them, f32[R, V]."""
        return self.edited().float() * self.factors()[0].unsqueeze(1)


# Each of the four samplers returns (token ids i64[R], f32[R] that is finite for ordinary rows).


def _greedy(rows: _Rows) -> tuple[Tensor, Tensor]:
    best, ids = argmax_rows(rows.edited())
    return ids, best.float()


def _unfiltered(rows: _Rows) -> tuple[Tensor, Tensor]:
    best, ids = [], []
    for block in rows.blocks():
        scores = block.edited().float() * (1.0 / block.of("temperature")).unsqueeze(1)
        scores += gumbel_noise(block.of("seed"), block.positions, scores.shape[1])
        block_best, block_ids = argmax_rows(scores)
        best.append(block_best)
        ids.append(block_ids)
    return torch.cat(ids), torch.cat(best)


def _filtered(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Per block, find the head of each row; then cut and draw for all rows together."""
    bests, totals, heads = [], [], []
    start = 0
    for block in rows.blocks():
        scaled = block.measured()
        maxima = group_maxima(scaled)
        best = maxima.amax(1)
        total, bounds = _head_bounds(block, scaled, maxima, best)
        row, head_ids, values = at_least(scaled, maxima, bounds)
        bests.append(best)
        totals.append(total)
        heads.append((row + start, head_ids, values))
        start += best.shape[0]
    best, total = torch.cat(bests), torch.cat(totals)
    ids = torch.zeros_like(rows.slots)
    for group, head in _split_by_width(ids.shape[0], heads):
        slots, positions = rows.slots[group], rows.positions[group]
        of_group = _Rows(rows.logits, slots, positions, rows.params)
        table = sorted_rows(group.shape[0], *head)
        ids[group] = _draw(of_group, *table, best[group], total[group])
    return ids, best


def _rare(rows: _Rows) -> tuple[Tensor, Tensor]:
    best, ids = [], []
    for block in rows.blocks():
        scaled = block.measured()
        maxima = group_maxima(scaled)
        best.append(maxima.amax(1))
        ids.append(torch.zeros_like(block.slots))
        for i_row in best[-1].isfinite().nonzero().squeeze(1).tolist():
            ids[-1][i_row] = _draw_rare(block.take_one(i_row), scaled[i_row], maxima[i_row])
    return torch.cat(ids), torch.cat(best)


def _draw_rare(one: _Rows, scaled: Tensor, maxima: Tensor) -> Tensor:
    """Steps 8 and 9 on one row f32[V]: its token, i64[]."""
    slot, position = int(one.slots), int(one.positions)
    kept = kept_of_row(scaled, maxima, filters_of(slot, position, one.params))
    seed = one.of("seed")
    if kept.shape[0] * WORDS > scaled.shape[0]:  # a call of the generator serves so many ids
        noise = gumbel_noise(seed, one.positions, scaled.shape[0])[0, kept]
    else:
        noise = gumbel_noise_at(seed, one.positions, kept.unsqueeze(0))[0]
    return kept[(scaled[kept] * one.factors()[1] + noise).argmax()]


Head = tuple[Tensor, Tensor, Tensor]
"""What `at_least` returns: row i64[N], id i64[N], value f32[N], by row, then id."""


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
    rows: _Rows, scaled: Tensor, maxima: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """(total mass i64[R], bound f32[R]) of each row; no value below the bound survives a filter.

    The total is the row's own where top-p stands alone, else 0: then the head will tell it.
    """
    top_k, top_p = rows.of("top_k").long(), rows.of("top_p")
    total = torch.zeros_like(top_k)
    bounds = torch.full_like(best, -torch.inf)
    if (top_k > 0).any():
        bounds = top_k_bounds(maxima, top_k.clamp(min=1)).where(top_k > 0, bounds)
    for i in ((top_k == 0) & (top_p < 1)).nonzero().squeeze(1).tolist():
        total[i] = fixed_point_mass(scaled[i], best[i]).sum()
        mass, share = int(total[i]), float(top_p[i])
        bounds[i] = top_p_bound(maxima[i], best[i], mass, share, scaled.shape[1])
    # Where top-k and top-p both cut, top-p needs all of top-k's mass: no short cut for min-p then.
    min_p_bounds = best + rows.of("min_p").log()
    return total, bounds.maximum(min_p_bounds.where((top_k == 0) | (top_p == 1), bounds))


def _draw(rows: _Rows, values: Tensor, ids: Tensor, best: Tensor, total: Tensor) -> Tensor:
    """Steps 8 and 9 on a table of candidates [R, C], best first: the token of each row, i64[R].

    `rows.logits` are not read.
    """
    top_k, top_p = rows.of("top_k").long(), rows.of("top_p")
    column = torch.arange(values.shape[1])
    kept = values > -torch.inf
    kept &= (column < top_k.unsqueeze(1)) | (top_k == 0).unsqueeze(1)
    masses = fixed_point_mass(values, best.unsqueeze(1)) * kept
    total = masses.sum(1).where(top_k > 0, total)
    before = masses.cumsum(1) - masses
    target = _top_p_target(top_p, total).unsqueeze(1)
    kept &= (before < target) | (top_p == 1).unsqueeze(1)
    kept &= values >= (best + rows.of("min_p").log()).unsqueeze(1)
    width = max(1, int(kept.sum(1).max()))
    values, ids, kept = values[:, :width], ids[:, :width], kept[:, :width]
    noise = gumbel_noise_at(rows.of("seed"), rows.positions, ids)
    scores = values * rows.factors()[1].unsqueeze(1) + noise
    scores.masked_fill_(~kept, -torch.inf)
    winners = scores == scores.amax(1, keepdim=True)
    return ids.masked_fill(~winners, rows.params.vocab).amin(1)  # the lowest id of equal scores


def _top_p_target(top_p: Tensor, total: Tensor) -> Tensor:
    """`filters.share_of` of tensors: f32[...], i64[...] -> i64[...]."""
    target = (top_p.double() * total.double()).ceil().to(torch.int64)
    return target.minimum(total).clamp(min=1)
