"""Log-probabilities of prompt tokens: one more read of the logits that a prefill chunk has anyway.

Raw, that is log_softmax of the unedited logits in float32 (natural log). The logits of all the
chunk's rows at once could be gigabytes, so they are made and used a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from millrace.engine.core.messages import TokenLogprobs

ROWS_AT_ONCE = 64


def prompt_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    num_top: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> list[TokenLogprobs]:
    """Score targets i64 [N] under hidden states [N, E]; `logits` maps [n, E] to [n, V]."""
    scored: list[TokenLogprobs] = []
    for rows, ids in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        logprobs = torch.log_softmax(logits(rows).float(), dim=-1)  # [n, V]
        chosen = logprobs.gather(1, ids[:, None])  # [n, 1]
        ranks = (logprobs > chosen).sum(dim=1) + 1
        top, top_ids = logprobs.topk(num_top, dim=1)
        columns = (ids, chosen[:, 0], ranks, top_ids, top)
        scored += map(TokenLogprobs, *(column.tolist() for column in columns))
    return scored
