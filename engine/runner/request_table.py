"""RequestTable: what the device knows of each running request, in dense tensors indexed by slot.

The host sends changes only (a StepPlan); positions, last tokens and penalty counts advance on the
device. Rows of free slots hold whatever was there before: nothing reads them.

S slots, C = max_context tokens, M = blocks of a full context, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from millrace.engine.core.messages import NewRequest
from millrace.kernels.slot_sampling import SlotSampling, SlotValues
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.request import Request


class RequestTable:
    """Tokens, progress, block table and sampling parameters by slot."""

    def __init__(
        self, slots: int, max_context: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        max_blocks = -(-max_context // block_size)
        # One column more than the context: a step launched ahead may draw a token past its end.
        self.tokens = torch.zeros(slots, max_context + 1, dtype=torch.int64, device=device)  # [S,C]
        self.computed = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] tokens with KV
        self.block_table = torch.zeros(slots, max_blocks, dtype=torch.int32, device=device)  # [S,M]
        self.sampling = SlotSampling.zeros(slots, vocab_size, device)
        self._device = device

    def update(self, plan: StepPlan) -> None:
        """Apply a plan's admissions and new blocks, in that order."""
        starts = {chunk.slot: chunk.start for chunk in plan.prefill}
        for request in plan.admitted:
            self._admit(request, starts[request.slot])
        if plan.block_appends:
            rows = torch.tensor(plan.block_appends, device=self._device)  # [n, 3]
            self.block_table[rows[:, 0], rows[:, 1]] = rows[:, 2].to(torch.int32)

    def _admit(self, request: Request, start: int) -> None:
        settings = request.payload
        assert isinstance(settings, NewRequest), "the engine submits NewRequests"
        slot, known = request.slot, request.known_tokens()
        self.tokens[slot, : len(known)] = torch.from_numpy(known).to(self._device)
        self.computed[slot] = start
        self.sampling.write(slot, slot_values(settings, request))


def slot_values(settings: NewRequest, request: Request) -> SlotValues:
    """The sampler's view of a request's parameters.

    A request that returns after a preemption brings output tokens along; they count for the
    penalties exactly as when they were drawn.
    """
    params = settings.params
    penalised = (
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )
    return SlotValues(
        temperature=params.temperature,
        temperature_last=params.temperature_last,
        top_n_sigma=params.top_n_sigma,
        top_k=max(params.top_k, 0),
        typical_p=params.typical_p,
        top_p=params.top_p,
        min_p=params.min_p,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed or 0,
        bias=dict(params.logit_bias or {})
        | dict.fromkeys(params.banned_token_ids or (), -math.inf),
        allowed_ids=params.allowed_token_ids,
        stop_ids=settings.stop_token_ids,
        min_position=len(request.prompt) + params.min_tokens,
        prompt_ids=request.prompt.tolist() if penalised else (),
        output_ids=request.outputs if penalised else (),
    )
