"""Processed logprobs: of the distribution that a token was drawn from.

The formula of `logprobs.py` over the logits as step 9 of `sampling.py` sees them: after bias, bans,
penalties, filters and temperature; dropped tokens are -inf and count for nothing. A greedy row has
neither filters nor temperature. Ranks and the best tokens are of the same logits, so of fewer
survivors than `num_top` the last ones named have the logprob -inf.

Letters: R rows, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from millrace.kernels.filters import kept_tokens
from millrace.kernels.logprobs import RawLogprobs, raw_logprobs_cpu, raw_logprobs_reference
from millrace.kernels.sampling import (
    SampledTokens,
    check_inputs,
    edit_row,
    filters_of,
    temperature_factors,
)
from millrace.kernels.slot_sampling import SlotSampling


def processed_logprobs_reference(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    sampled: SampledTokens,
    num_top: int,
) -> RawLogprobs:
    """Score what a `sample` with the same arguments has `sampled`, 0 <= num_top <= MAX_TOP.

    Of a row that is not ok, or holds +inf, all logprobs are NaN.
    """
    return _score(raw_logprobs_reference, logits, slots, positions, params, sampled, num_top)


def processed_logprobs_cpu(
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
    processed = logits.to(torch.float32, copy=True)
    for row, slot, position in zip(processed, slots.tolist(), positions.tolist(), strict=True):
        row.copy_(processed_row(edit_row(row, slot, position, params), slot, position, params))
    return score(processed, sampled.token_ids, num_top)


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
