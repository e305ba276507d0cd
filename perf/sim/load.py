"""Load: what a step's plan asks of a device, counted from the plans alone.

A plan carries changes, so how much KV its decodes read is known only to who has seen all plans
before it. `LoadCounter` keeps that, by slot, as a runner would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from millrace.scheduler.plan import PrefillChunk, StepPlan


@dataclass(frozen=True, slots=True)
class Attended:
    """What a step's attention reads in a layer where a position sees the last `width` only."""

    width: int  # tokens
    context_tokens: int  # the same three as of Load
    prefill_context_tokens: int
    prefill_pairs: int


@dataclass(frozen=True, slots=True)
class Load:
    """Of one step. Contexts and pairs are those of a layer that sees everything."""

    prefill_tokens: int
    decodes: int  # requests that decode one token
    samples: int  # rows whose logits are computed: the decodes, and the prompts that end
    context_tokens: int  # KV that the decodes read
    prefill_context_tokens: int  # KV that the chunks read, each once: up to the chunk's end
    prefill_pairs: int  # query and key positions that the chunks' attention brings together
    windowed: tuple[Attended, ...] = ()  # one for each width that was asked for
    swapped_blocks: int = 0  # to the host and back

    @property
    def tokens(self) -> int:
        """Rows of the step's matrix products."""
        return self.prefill_tokens + self.decodes


class LoadCounter:
    """Sees every plan, in order. `widths` are those of the model's sliding windows, in tokens."""

    def __init__(self, max_running: int, widths: Sequence[int] = ()) -> None:
        self._widths = tuple(widths)
        self._computed = np.zeros(max_running, np.int64)  # by slot
        self._decodes = np.zeros(max_running, np.bool_)

    def forget_decodes(self) -> None:
        """Launched steps were lost; the next plan starts from no decodes."""
        self._decodes[:] = False

    def decoding(self) -> np.ndarray:
        """Slots that decode in the newest step."""
        return self._decodes.nonzero()[0]

    def count(self, plan: StepPlan) -> Load:
        """The load of the next step."""
        self._decodes[plan.decode_leaves] = False
        self._decodes[plan.decode_joins] = True
        self._computed += self._decodes
        prefill_tokens = read = pairs = 0
        for chunk in plan.prefill:
            end = chunk.start + chunk.length
            self._computed[chunk.slot] = end
            prefill_tokens += chunk.length
            read += end
            pairs += chunk.length * (chunk.start + end + 1) // 2
        contexts = self._computed[self._decodes]
        return Load(
            prefill_tokens,
            plan.num_decodes,
            plan.num_decodes + sum(chunk.samples for chunk in plan.prefill),
            int(contexts.sum()),
            read,
            pairs,
            tuple(_attended(width, contexts, plan.prefill) for width in self._widths),
            len(plan.swap_outs) + len(plan.swap_ins),
        )


def _attended(width: int, contexts: np.ndarray, chunks: Sequence[PrefillChunk]) -> Attended:
    """`contexts` [n] of the decodes, their own token included."""
    read = pairs = 0
    for chunk in chunks:
        end = chunk.start + chunk.length
        read += end - max(0, chunk.start - width + 1)
        pairs += _pairs_up_to(end, width) - _pairs_up_to(chunk.start, width)
    return Attended(width, int(np.minimum(contexts, width).sum()), read, pairs)


def _pairs_up_to(num_tokens: int, width: int) -> int:
    """Of the first tokens of a text: the sum of min(i, width) for i from 1 on."""
    narrow = min(num_tokens, width)
    return narrow * (narrow + 1) // 2 + (num_tokens - narrow) * width
