"""Filters: which tokens of a row may be drawn, the definition, on one row of finite logits.

Six filters, in this order; each looks at what the one before has left, its probabilities p made to
sum to 1 again. Without a parameter a filter keeps everything.

    top-n-sigma   l >= max(l) - n * std(l)                   arXiv 2411.07641; formula of llama.cpp
    top-k         the k best
    typical-p     |-ln p - H| <= r, H the entropy, r the     arXiv 2202.00666; transformers' sets
                  least that holds the mass typical_p
    top-p         the shortest head that holds the mass top_p, with the token that crosses it
    min-p         p >= min_p * max(p)
    XTC           without the best tokens of p >= threshold, but for the last of these;
                  rolled for by coin, see `rng.py`           llama.cpp's formula

Ties. Tokens are ordered by (value descending, id ascending), and top-k, top-p and XTC cut in that
order: exactly k are kept, where transformers keeps every token that ties with the k-th. typical-p
keeps all tokens that tie for its last place, as there.

Sums. A token's mass is the integer floor(exp(l - max) * 2^40). Sums of integers do not depend on
their order, so neither the batch nor the launch can move a cut; what truncation loses is below
V * 2^-40 of the best token's mass. The deviation in top-n-sigma is of float64 sums, whose order is
lost when the bound is rounded to float32.

typical-p needs no logarithm of a probability: -ln p = lse - l and H = lse - E[l], so the distance
is |l - E[l]|, and typical tokens are those near the expected logit. Example: logits 0, -1, -4 have
p = 0.72, 0.27, 0.01, E[l] = -0.32 and distances 0.32, 0.68, 3.68.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.logprobs import MASS_ONE


@dataclass(frozen=True)
class Filters:
    """The filters of one row; the defaults keep everything."""

    top_n_sigma: float = 0.0
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_threshold: float | None = None  # None: off, or the coin fell the other way


def kept_tokens(logits: Tensor, filters: Filters) -> Tensor:
    """Ids that survive, best first: logits f32[V] below +inf -> i64[kept]."""
    values, ids = logits.sort(descending=True, stable=True)
    best = values[0]
    ids = ids[values > -math.inf]
    if filters.top_n_sigma > 0.0:
        ids = ids[logits[ids] >= n_sigma_bound(logits, best, filters.top_n_sigma)]
    if filters.top_k > 0:
        ids = ids[: filters.top_k]
    if filters.typical_p < 1.0:
        total, expected = mass_and_expected(logits[ids], best)
        target = share_of(filters.typical_p, total)
        ids = ids[are_typical(logits[ids], best, expected, target)]
    if filters.top_p < 1.0:
        masses = fixed_point_mass(logits[ids], best)
        before = masses.cumsum(0) - masses
        ids = ids[before < share_of(filters.top_p, int(masses.sum()))]
    if filters.min_p > 0.0:
        ids = ids[logits[ids] >= logits[ids[0]] + torch.tensor(filters.min_p).log()]
    if filters.xtc_threshold is not None:
        masses = fixed_point_mass(logits[ids], best)
        top = int((masses >= share_of(filters.xtc_threshold, int(masses.sum()))).sum())
        ids = ids[max(0, top - 1) :]
    return ids


def n_sigma_bound(logits: Tensor, best: Tensor, n_sigma: float) -> Tensor:
    """max - n * std of the finite ones of logits f32[V] -> f32[]."""
    x = logits[logits > -math.inf].double()
    mean = x.mean()
    variance = ((x * x).mean() - mean * mean).clamp(min=0.0)
    return (best.double() - n_sigma * variance.sqrt()).float()


def mass_and_expected(values: Tensor, best: Tensor) -> tuple[int, Tensor]:
    """Of finite values f32[N]: their mass, and E[l], f32[]."""
    below = best - values
    total = fixed_point_mass(values, best).sum()
    weighted = ((-below).exp() * below * MASS_ONE).to(torch.int64)
    return int(total), best - (weighted.sum().double() / total.double()).float()


def are_typical(values: Tensor, best: Tensor, expected: Tensor, target: int) -> Tensor:
    """Which of the finite values f32[N] are the nearest to `expected` that weigh `target`: bool[N].

    Values that are farther than those may be left out.
    """
    distances = (values - expected).abs()
    order = distances.argsort(stable=True)
    through = fixed_point_mass(values, best)[order].cumsum(0)
    return distances <= distances[order[int((through < target).sum())]]


def fixed_point_mass(values: Tensor, best: Tensor) -> Tensor:
    """Masses relative to the best token's: f32, f32 -> i64, floor(exp(values - best) * 2^40)."""
    return ((values - best).exp_() * MASS_ONE).to(torch.int64)


def share_of(share: float, total: int) -> int:
    """The mass that a share of `total` amounts to: ceil(share * total) in float64, at least 1."""
    return max(1, min(total, math.ceil(share * float(total))))
