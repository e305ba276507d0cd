"""Raw logprobs: what the model itself says of a token, before any bias, penalty or temperature.

    logprob(id) = l[id] - max(l) - ln(sum over v of exp(l[v] - max(l)))
    rank(id)    = 1 + number of logits above l[id]

and the same of the `num_top` best tokens, by (value descending, id ascending). The sum is taken
over integers, floor(exp(l - max) * 2^40), so that its order, hence the batch, cannot move a bit;
truncation loses under V * 2^-40. Letters: R rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.candidates import (
    at_least,
    count_above,
    group_maxima,
    sorted_rows,
    top_k_bounds,
)
from millrace.kernels.checks import expect

MASS_ONE = float(1 << 40)
"""Fixed-point one: the mass of a row's best token."""
MAX_TOP = 64
"""The most `num_top` that every implementation offers."""


@dataclass
class RawLogprobs:
    """Rows as in the logits given."""

    logprobs: Tensor  # f32[R], of the chosen token
    ranks: Tensor  # i64[R], of the chosen token, from 1
    top_ids: Tensor  # i64[R, num_top]
    top_logprobs: Tensor  # f32[R, num_top]


def raw_logprobs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> RawLogprobs:
    """logits f32|bf16|f16[R, V], token_ids i64[R], 0 <= num_top <= MAX_TOP.

    Of a row that holds NaN or +inf, all logprobs are NaN.
    """
    check_logprob_inputs(logits, token_ids, num_top)
    x = logits.float()
    chosen = x.gather(1, token_ids.unsqueeze(1))
    values, ids = x.sort(dim=1, descending=True, stable=True)
    best, log_sum = log_sum_exp(x, values[:, :1])
    return RawLogprobs(
        logprobs=(chosen - best - log_sum).squeeze(1),
        ranks=(x > chosen).sum(1) + 1,
        top_ids=ids[:, :num_top],
        top_logprobs=values[:, :num_top] - best - log_sum,
    )


def raw_logprobs_cpu(logits: Tensor, token_ids: Tensor, num_top: int) -> RawLogprobs:
    """The same bits as the reference, without a sort; a row at a time stays in the cache."""
    check_logprob_inputs(logits, token_ids, num_top)
    rows = logits.shape[0]
    out = RawLogprobs(
        logprobs=torch.empty(rows),
        ranks=torch.empty(rows, dtype=torch.int64),
        top_ids=torch.empty(rows, num_top, dtype=torch.int64),
        top_logprobs=torch.empty(rows, num_top),
    )
    for i_row in range(rows):
        x = logits[i_row : i_row + 1].float().contiguous()
        chosen = x[:, token_ids[i_row]]
        maxima = group_maxima(x)
        best, log_sum = log_sum_exp(x, maxima.amax(1, keepdim=True))
        out.logprobs[i_row] = chosen - best - log_sum
        out.ranks[i_row] = count_above(x, maxima, chosen) + 1
        if num_top:
            out.top_ids[i_row], top = _top(x, maxima, num_top)
            out.top_logprobs[i_row] = top - best - log_sum
    return out


def log_sum_exp(x: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x f32[R, V] and their maxima f32[R, 1] -> (best, ln(sum(exp(x - best)))), f32[R, 1].

    Both are NaN where `best` is not finite. The two are not added up: logits may be large, and
    (l - best) - ln(sum) keeps the digits that l - (best + ln(sum)) would lose.
    """
    best = best.where(best.isfinite(), torch.nan)
    masses = (x - best).exp_().mul_(MASS_ONE).to(torch.int64)
    total = masses.sum(1, keepdim=True).double() / MASS_ONE
    return best, total.log().float()


def check_logprob_inputs(logits: Tensor, token_ids: Tensor, num_top: int) -> None:
    """ValueError naming what does not fit. Token ids are not read: a GPU would have to wait."""
    expect("logits", logits, (None, None))
    rows, vocab = logits.shape
    expect("token_ids", token_ids, (rows,), torch.int64)
    most = min(MAX_TOP, vocab)
    if not 0 <= num_top <= most:
        raise ValueError(f"num_top: expected 0 to {most}, got {num_top}")


def _top(x: Tensor, maxima: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The `num_top` best of x[1, V]: (ids, values), each [num_top]."""
    bounds = top_k_bounds(maxima, torch.tensor([num_top]))
    values, ids = sorted_rows(1, *at_least(x, maxima, bounds))
    if ids.shape[1] < num_top:  # fewer finite values than that
        values, ids = x.sort(dim=1, descending=True, stable=True)
    return ids[0, :num_top], values[0, :num_top]
