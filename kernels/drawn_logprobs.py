"""Logprobs of drawn tokens: of the model's logits, or of the distribution they were drawn from.

The formula of `logprobs.py`, each row as its slot asks:

    RAW_LOGPROBS         over the model's logits, before any bias, penalty or temperature
    PROCESSED_LOGPROBS   over the logits as step 9 of `sampling.py` sees them: after bias, bans,
                         penalties, filters and temperature; dropped tokens are -inf and count for
                         nothing. A greedy row has neither filters nor temperature
    NO_LOGPROBS          not at all: the row's logprob is NaN, its other fields mean nothing

Ranks and the best tokens are of the same logits: processed, and of fewer survivors than `num_top`,
the last ones named have the logprob -inf.

Letters: R rows, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from millrace.kernels.filters import kept_tokens
from millrace.kernels.logprobs import (
    RawLogprobs,
    check_logprob_inputs,
    raw_logprobs_cpu,
    raw_logprobs_reference,
)
from millrace.kernels.sampling import (
    SampledTokens,
    check_inputs,
    edit_row,
    filters_of,
    temperature_factors,
)
from millrace.kernels.slot_sampling import NO_LOGPROBS, PROCESSED_LOGPROBS, SlotSampling


def drawn_logprobs_reference(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    """Score what a `sample` with the same arguments has `sampled`, 0 <= num_top <= MAX_TOP.

    Of a row whose logits hold NaN or +inf, or that is not ok, all logprobs are NaN.
    """
    return _score(raw_logprobs_reference, logits, slots, positions, params, sampled, num_top)


def drawn_logprobs_cpu(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    """The same bits as the reference."""
    return _score(raw_logprobs_cpu, logits, slots, positions, params, sampled, num_top)


def _score(
    score: Callable[[Tensor, Tensor, int], RawLogprobs],
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    check_inputs(logits, slots, positions, params)
    check_logprob_inputs(logits, sampled.token_ids, num_top)
    kinds = params.logprobs[slots]
    rows = (kinds != NO_LOGPROBS).nonzero().squeeze(1)
    asked = logits[rows].float()
    for i_asked, i_row in enumerate(rows.tolist()):
        if kinds[i_row] == PROCESSED_LOGPROBS:
            slot, position, row = int(slots[i_row]), int(positions[i_row]), asked[i_asked]
            row.copy_(processed_row(edit_row(row, slot, position, params), slot, position, params))
    scored = score(asked, sampled.token_ids[rows], num_top)
    count, device = slots.shape[0], logits.device
    all_rows = RawLogprobs(
        logprobs=torch.full((count,), math.nan, device=device),
        ranks=torch.zeros(count, dtype=torch.int64, device=device),
        top_ids=torch.zeros(count, num_top, dtype=torch.int64, device=device),
        top_logprobs=torch.full((count, num_top), math.nan, device=device),
    )
    for name, values in vars(scored).items():
        getattr(all_rows, name)[rows] = values
    return all_rows


def processed_row(row: Tensor, slot: int, position: int, params: SlotSampling) -> Tensor:
    """Steps 6 to 8 on one edited row f32[V], with the temperature, -inf where dropped: f32[V]."""
    greedy, before, after = temperature_factors(slot, params)
    scaled = row * before
    best = scaled.max()
    if greedy or not best < math.inf or best == -math.inf:
        return scaled
    kept = kept_tokens(scaled, filters_of(slot, position, params))
    processed = torch.full_like(scaled, -math.inf)
    processed[kept] = scaled[kept] * after
    return processed
