"""Which tokens of one row survive, on the CPU: those of `filters.py`, without a sort of the row.

A filter that measures mass needs the sums of all that is left before it. These are integers, from
one sweep of the row. What it keeps lies above a bound, so that only the tokens which reach that are
listed (`candidates.py`) and sorted:

    top-n-sigma   its own bound
    top-k         the k-th greatest maximum of a group
    typical-p     a value b above which tokens weigh the target, as top-p's: none that is farther
                  from E[l] than the farthest of those is typical
    top-p         the greatest group maxima that together weigh the target
    min-p         its own bound

Filters after the first one look at the list alone. XTC sorts none but the tokens of more than its
threshold; where it stands alone, the list is the row.
"""

from dataclasses import replace

import torch
from torch import Tensor

from millrace.kernels.candidates import at_least, top_k_bounds
from millrace.kernels.filters import (
    Filters,
    are_typical,
    fixed_point_mass,
    mass_and_expected,
    n_sigma_bound,
    share_of,
)
from millrace.kernels.logprobs import MASS_ONE

_BOUND_SLACK = 1e-3  # lowers a bound made with exp and ln, by far more than they round
_ROUNDING = 1e-6  # of the greatest logit: more than a difference of two rounds


def kept_of_row(row: Tensor, maxima: Tensor, filters: Filters) -> Tensor:
    """`kept_tokens`, by id: row f32[V], its best finite; its group maxima -> i64[kept]."""
    best = maxima.max()
    floor = best.new_tensor(torch.finfo(row.dtype).min)
    if filters.top_n_sigma > 0.0:
        floor = n_sigma_bound(row, best, filters.top_n_sigma).maximum(floor)
    total, bound = None, floor
    if filters.top_k > 0:
        bound = top_k_bounds(maxima.unsqueeze(0), torch.tensor([filters.top_k]))[0]
    elif filters.typical_p < 1.0:
        ids = _typical(row, maxima, best, floor, filters.typical_p)
        return _cut(row[ids], ids, best, replace(filters, typical_p=1.0), None)
    elif filters.top_p < 1.0:
        total = int(fixed_point_mass(row[row >= floor], best).sum())
        bound = top_p_bound(maxima, best, total, filters.top_p, row.shape[0])
    elif filters.min_p > 0.0:
        bound = best + torch.tensor(filters.min_p).log()
    _, ids, values = at_least(row.unsqueeze(0), maxima.unsqueeze(0), bound.maximum(floor).view(1))
    return _cut(values, ids, best, filters, total)


def _typical(row: Tensor, maxima: Tensor, best: Tensor, floor: Tensor, typical_p: float) -> Tensor:
    """Ids of the typical tokens among those that reach `floor`, i64[kept]."""
    total, expected = mass_and_expected(row[row >= floor], best)
    bound = top_p_bound(maxima, best, total, typical_p, row.shape[0])
    # As far below E[l] as the farthest of the tokens that reach the bound, on either side of it.
    slack = _BOUND_SLACK + _ROUNDING * (best.abs() + bound.abs())
    bound = bound.minimum(expected - (best - expected)) - slack
    _, ids, values = at_least(row.unsqueeze(0), maxima.unsqueeze(0), bound.maximum(floor).view(1))
    return ids[are_typical(values, best, expected, share_of(typical_p, total))]


def _cut(values: Tensor, ids: Tensor, best: Tensor, filters: Filters, total: int | None) -> Tensor:
    """The filters after top-n-sigma, on a list by id: f32[N], i64[N] -> i64[kept], by id.

    `total` is the mass that top-p measures by where the list is not all that it has before it.
    """
    if filters.top_k > 0 or filters.top_p < 1.0:
        values, order = values.sort(descending=True, stable=True)
        ids = ids[order]
    if filters.top_k > 0:
        values, ids = values[: filters.top_k], ids[: filters.top_k]
    if filters.typical_p < 1.0:
        mass, expected = mass_and_expected(values, best)
        kept = are_typical(values, best, expected, share_of(filters.typical_p, mass))
        values, ids = values[kept], ids[kept]
    if filters.top_p < 1.0:
        masses = fixed_point_mass(values, best)
        target = share_of(filters.top_p, int(masses.sum()) if total is None else total)
        kept = masses.cumsum(0) - masses < target
        values, ids = values[kept], ids[kept]
    if filters.min_p > 0.0:
        kept = values >= values.max() + torch.tensor(filters.min_p).log()
        values, ids = values[kept], ids[kept]
    if filters.xtc_threshold is not None:
        ids = ids[_after_xtc(values, best, filters.xtc_threshold)]
    return ids.sort().values


def _after_xtc(values: Tensor, best: Tensor, threshold: float) -> Tensor:
    """Which tokens XTC leaves of values f32[N] by id, or best first: bool[N]."""
    masses = fixed_point_mass(values, best)
    heavy = (masses >= share_of(threshold, int(masses.sum()))).nonzero().squeeze(1)
    kept = torch.ones_like(values, dtype=torch.bool)
    if len(heavy) > 1:
        kept[heavy[values[heavy].argsort(descending=True, stable=True)[:-1]]] = False
    return kept


def top_p_bound(maxima: Tensor, best: Tensor, total: int, top_p: float, vocab: int) -> Tensor:
    """A value f32[] at or above which a row's tokens weigh top_p of `total`, from its maxima [N].

    The greatest group maxima, best first, until they alone weigh that much. Should all of them
    not: tokens lighter than 1/V of what may be left out cannot together weigh more than that.
    """
    target = share_of(top_p, total)
    heads = maxima.sort(descending=True).values
    reached = fixed_point_mass(heads, best).cumsum(0) >= target
    if reached[-1]:
        return heads[reached.byte().argmax()]
    spare = torch.tensor(total - target, dtype=torch.float64) / MASS_ONE / vocab
    return best + spare.log().float() - _BOUND_SLACK
