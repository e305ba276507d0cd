"""Load: what a step's plan asks of a device, counted from the plans alone.

A plan carries changes, so how much KV its decodes read is known only to who has seen all plans
before it. `LoadCounter` keeps that, by slot, as a runner would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Load:
    """Of one step."""

    prefill_tokens: int
    decodes: int  # requests that decode one token
    samples: int  # rows whose logits are computed: the decodes, and the prompts that end
    context_tokens: int  # KV that the decodes read
    prefill_context_tokens: int  # KV that the chunks read, each once: up to the chunk's end
    prefill_pairs: int  # query and key positions that the chunks' attention brings together

    @property
    def tokens(self) -> int:
        """Rows of the step's matrix products."""
        return self.prefill_tokens + self.decodes


class LoadCounter:
    """Sees every plan, in order."""

    def __init__(self, max_running: int) -> None:
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
        return Load(
            prefill_tokens,
            plan.num_decodes,
            plan.num_decodes + sum(chunk.samples for chunk in plan.prefill),
            int(self._computed[self._decodes].sum()),
            read,
            pairs,
        )
