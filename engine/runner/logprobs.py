"""Log-probabilities for clients: of drawn tokens, and of the tokens of a prompt.

Of prompts raw, that is of the model's logits before any edit; of drawn tokens as the request asks
(`kernels/logprobs.py` and `kernels/processed_logprobs.py` have the definitions). They are computed
with the step and read with its tokens: scoring does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from millrace.engine.core.messages import TokenLogprobs
from millrace.kernels.dispatch import Operations
from millrace.kernels.logprobs import RawLogprobs

ROWS_AT_ONCE = 64  # of a prompt: the logits of a whole chunk could be gigabytes


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens i64 [N] and their logprobs, on the device."""

    token_ids: torch.Tensor
    raw: RawLogprobs

    def read(self) -> list[TokenLogprobs]:
        """One entry for each token; waits for the device."""
        raw = self.raw
        columns = (self.token_ids, raw.logprobs, raw.ranks, raw.top_ids, raw.top_logprobs)
        return list(map(TokenLogprobs, *(column.tolist() for column in columns)))


def score_prompt(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    num_top: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
    operations: Operations,
) -> list[ScoredTokens]:
    """Score targets i64 [N] under hidden states [N, E]; `logits` maps [n, E] to [n, V]."""
    pairs = zip(torch.split(hidden, ROWS_AT_ONCE), torch.split(targets, ROWS_AT_ONCE), strict=True)
    return [
        ScoredTokens(ids, operations.raw_logprobs(logits(rows), ids, num_top))
        for rows, ids in pairs
    ]
