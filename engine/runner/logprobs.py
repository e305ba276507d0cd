"""Log-probabilities for clients: of drawn tokens, and of the tokens of a prompt.

Of prompts raw, that is of the model's logits before any edit; of drawn tokens as the request asks
(`kernels/logprobs.py` and `kernels/drawn_logprobs.py` have the definitions). Both are computed with
the step and read with its tokens: scoring does not wait for the device.

Drawn tokens are scored all together, from what the sampler has seen of their logits, always with
the same number of alternatives, and the host takes what was asked for. So the scores have a place
of their own beside the tokens, a graph can write them, and they travel in the tokens' copy. A
column for each row of the step, i64, floats as their bits:

    rank | logprob | num_top ids | num_top logprobs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from millrace.engine.core.messages import TokenLogprobs
from millrace.kernels.dispatch import Operations
from millrace.kernels.logprobs import RawLogprobs

ROWS_AT_ONCE = 64  # of a prompt: the logits of a whole chunk could be gigabytes
OF_CHOSEN = 2  # rank, logprob


def score_rows(num_top: int) -> int:
    """Numbers that a scored token takes."""
    return OF_CHOSEN + 2 * num_top


def write_scores(scores: RawLogprobs, out: torch.Tensor) -> None:
    """Lay out the scores of N tokens in `out`, i64 [score_rows, N]."""
    num_top = scores.top_ids.shape[1]
    out[0] = scores.ranks
    out[1] = scores.logprobs.view(torch.int32)
    out[OF_CHOSEN : OF_CHOSEN + num_top] = scores.top_ids.t()
    out[OF_CHOSEN + num_top :] = scores.top_logprobs.view(torch.int32).t()


def read_scores(
    token_ids: npt.NDArray[np.int64], scores: npt.NDArray[np.int64], asked: Mapping[int, int]
) -> list[TokenLogprobs]:
    """Of N tokens and their scores [score_rows, N], those of some rows.

    `asked` has these rows, and how many alternatives each wants.
    """
    num_top = (len(scores) - OF_CHOSEN) // 2
    entries = []
    for row, wanted in asked.items():
        column = scores[:, row]
        floats = column.astype(np.int32).view(np.float32)
        first = OF_CHOSEN + num_top
        entries.append(
            TokenLogprobs(
                token_id=int(token_ids[row]),
                logprob=float(floats[1]),
                rank=int(column[0]),
                top_ids=column[OF_CHOSEN:first][:wanted].tolist(),
                top_logprobs=floats[first:][:wanted].tolist(),
            )
        )
    return entries


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens i64 [N] of a prompt and their logprobs, on the device."""

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
