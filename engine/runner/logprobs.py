"""Log-probabilities for clients: of drawn tokens, and of the tokens of a prompt.

Of prompts raw, that is of the model's logits before any edit; of drawn tokens as the request asks
(`kernels/logprobs.py` and `kernels/processed_logprobs.py` have the definitions).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from millrace.engine.core.messages import TokenLogprobs
from millrace.kernels.dispatch import Operations
from millrace.kernels.logprobs import RawLogprobs

ROWS_AT_ONCE = 64  # of a prompt: the logits of a whole chunk could be gigabytes


def token_logprobs(token_ids: torch.Tensor, raw: RawLogprobs) -> list[TokenLogprobs]:
    """One entry for each of the tokens i64 [N] that `raw` was made for; waits for the device."""
    columns = (token_ids, raw.logprobs, raw.ranks, raw.top_ids, raw.top_logprobs)
    return list(map(TokenLogprobs, *(column.tolist() for column in columns)))


def prompt_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    num_top: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
    operations: Operations,
) -> list[TokenLogprobs]:
    """Score targets i64 [N] under hidden states [N, E]; `logits` maps [n, E] to [n, V]."""
    scored: list[TokenLogprobs] = []
    chunks = zip(torch.split(hidden, ROWS_AT_ONCE), torch.split(targets, ROWS_AT_ONCE), strict=True)
    for rows, ids in chunks:
        scored += token_logprobs(ids, operations.raw_logprobs(logits(rows), ids, num_top))
    return scored
