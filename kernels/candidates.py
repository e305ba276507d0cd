"""The head of each row of logits without sorting the row: argmax, and all values above a bound.

Both stand on group maxima. A row of V values is cut into groups of up to 32 neighbours; one sweep
yields the greatest of each. The k-th greatest group maximum is at most the k-th greatest value, so
the values at or above it hold the whole top k; and only groups whose maximum reaches a bound need
be read again. This is the CPU's way; everything here is exact, and a row is treated alike whatever
its neighbours.
"""

import math

import torch
from torch import Tensor

GROUP = 32


def group_maxima(x: Tensor) -> Tensor:
    """x[R, V] contiguous -> [R, V / g], the maxima of groups of g = gcd(V, 32) neighbours."""
    return x.view(x.shape[0], -1, _group(x)).amax(2)


def argmax_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[R, V] -> (maxima [R], i64[R] their lowest ids). NaN counts as the greatest value."""
    maxima = group_maxima(x)
    best_group = maxima.argmax(1)  # the first of equals, here and below
    rows = torch.arange(x.shape[0])
    group = x.view(x.shape[0], -1, _group(x))[rows, best_group]
    lane = group.argmax(1)
    return group[rows, lane], best_group * _group(x) + lane


def at_least(x: Tensor, maxima: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every finite value >= its row's bound: x f32[R, V], maxima of x, bounds f32[R].

    Returns (i64[N] row, i64[N] id, f32[N] value), by row, then id.
    """
    group = _group(x)
    bounds = bounds.clamp(min=torch.finfo(x.dtype).min)  # leaves out -inf
    row, i_group = (maxima >= bounds.unsqueeze(1)).nonzero(as_tuple=True)
    values = x.view(x.shape[0], -1, group)[row, i_group]
    pair, lane = (values >= bounds[row].unsqueeze(1)).nonzero(as_tuple=True)
    return row[pair], i_group[pair] * group + lane, values[pair, lane]


def count_above(x: Tensor, maxima: Tensor, bounds: Tensor) -> Tensor:
    """How many values lie above their row's bound: x [R, V], maxima of x, bounds [R] -> i64[R]."""
    row, i_group = (maxima > bounds.unsqueeze(1)).nonzero(as_tuple=True)
    above = x.view(x.shape[0], -1, _group(x))[row, i_group] > bounds[row].unsqueeze(1)
    counts = torch.zeros(x.shape[0], dtype=torch.int64)
    return counts.index_add_(0, row, above.sum(1))


def top_k_bounds(maxima: Tensor, top_k: Tensor) -> Tensor:
    """A bound f32[R] below which no value of the top_k i64[R] >= 1 lies; -inf where unknown."""
    widest = min(int(top_k.max()), maxima.shape[1])
    best = maxima.topk(widest, dim=1).values
    known = top_k <= widest
    kth = best.gather(1, (top_k.clamp(max=widest) - 1).unsqueeze(1)).squeeze(1)
    return kth.masked_fill(~known, -math.inf)


def sorted_rows(rows: int, row: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`at_least`'s answer as a table ordered by (value descending, id ascending).

    Returns (f32[rows, C] values padded with -inf, i64[rows, C] ids padded with 0), where C is the
    greatest number of values that a row has, at least 1.
    """
    counts = torch.bincount(row, minlength=rows)
    column = torch.arange(row.shape[0]) - (counts.cumsum(0) - counts)[row]
    shape = (rows, max(1, int(counts.max())))
    table = values.new_full(shape, -math.inf)
    table[row, column] = values
    table_ids = ids.new_zeros(shape)
    table_ids[row, column] = ids
    table, order = table.sort(dim=1, descending=True, stable=True)
    return table, table_ids.gather(1, order)


def _group(x: Tensor) -> int:
    return math.gcd(x.shape[1], GROUP)
