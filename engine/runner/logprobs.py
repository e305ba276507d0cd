"""Log-probabilities for clients: of drawn tokens, and of the tokens of a prompt.

Of prompts raw, that is of the model's logits before any edit; of drawn tokens as the request asks
(`kernels/logprobs.py` and `kernels/drawn_logprobs.py` have the definitions). Drawn tokens are
scored all together, from what the sampler has seen of their logits. Both are computed with the step
and read with its tokens: scoring does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def read_rows(self, asked: Mapping[int, int]) -> list[TokenLogprobs]:
        """The entries of some tokens, by row and how many alternatives; waits for the device."""
        rows, raw = list(asked), self.raw
        columns = (self.token_ids, raw.logprobs, raw.ranks, raw.top_ids, raw.top_logprobs)
        here = [column.cpu()[rows].tolist() for column in columns]
        return [
            TokenLogprobs(token_id, logprob, rank, ids[:num_top], logprobs[:num_top])
            for num_top, token_id, logprob, rank, ids, logprobs in zip(
                asked.values(), *here, strict=True
            )
        ]


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
