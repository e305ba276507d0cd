"""Runner (5 of 8): turns a StepPlan into device tensors, one forward pass and one draw.

Knows slots, not requests' owners. The tokens it draws stay on the device, as the next step's input;
`LaunchedStep.result()` is the only place where the host waits for them.

Before it: scheduler/scheduler.py, which made the plan. After it: engine/models/decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from millrace.engine.core.messages import NewRequest, TokenLogprobs
from millrace.engine.models.decoder import Decoder
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.runner.logprobs import prompt_logprobs
from millrace.engine.runner.request_table import RequestTable
from millrace.kernels.attention import AttentionBatch
from millrace.kernels.dispatch import Operations
from millrace.kernels.sampling import SampledTokens
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Request


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on their way. `slots` i64 [N] on the host, the rest not."""

    step: int
    slots: torch.Tensor
    sampled: SampledTokens
    stopped: torch.Tensor  # bool [N]
    num_top: dict[int, int]  # slot -> alternatives wanted with its token
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    """slot -> (first position scored, scores of that position on)"""

    def result(self) -> StepResult:
        """Wait for the tokens."""
        return StepResult(
            self.step,
            self.slots.numpy(),
            self.sampled.token_ids.cpu().numpy(),
            self.stopped.cpu().numpy(),
            self.sampled.ok.cpu().numpy(),
        )

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the drawn tokens, by slot, where asked for."""
        if not self.num_top:
            return {}
        sampled = self.sampled
        columns = (
            sampled.token_ids,
            sampled.logprobs,
            sampled.ranks,
            sampled.top_ids,
            sampled.top_logprobs,
        )
        rows = zip(self.slots.tolist(), *(column.tolist() for column in columns), strict=True)
        return {
            slot: TokenLogprobs(token, logprob, rank, ids[:n], top[:n])
            for slot, token, logprob, rank, ids, top in rows
            if (n := self.num_top.get(slot)) is not None
        }


class Runner:
    """One model on one device, with its KV cache and the table of running requests."""

    def __init__(
        self, model: Decoder, operations: Operations, kv: KVCache, table: RequestTable
    ) -> None:
        self._model = model
        self._operations = operations
        self._kv = kv
        self._table = table
        self._block_size = kv.keys[0].shape[1]
        slots = len(table.computed)
        self._decoding = np.zeros(slots, np.bool_)
        self._decode_slots = torch.zeros(0, dtype=torch.int64)
        self._computed = np.zeros(slots, np.int64)  # host mirror of table.computed
        self._num_top: dict[int, int] = {}  # slot -> output logprobs wanted
        self._prompt_top: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, alternatives)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> LaunchedStep:
        """Launch one step; the plan's changes are applied even if computing then fails."""
        self._update(plan)
        batch = self._batch(plan.prefill)
        hidden = self._model.forward(batch, self._kv)
        launched = self._draw(plan, batch, hidden)
        for row, chunk in enumerate(plan.prefill):
            if chunk.slot in self._prompt_top:
                start = len(self._decode_slots) + sum(c.length for c in plan.prefill[:row])
                scored = self._score_prompt(chunk, hidden[start : start + chunk.length])
                launched.prompt_logprobs[chunk.slot] = (chunk.start + 1, scored)
        return launched

    def forget_decodes(self) -> None:
        """No slot decodes any more: the scheduler has abandoned the launched steps."""
        self._decoding[:] = False
        self._decode_slots = torch.zeros(0, dtype=torch.int64)

    # ------------------------------------------------------------ plan -> tensors

    def _update(self, plan: StepPlan) -> None:
        self._table.update(plan)
        for slot in plan.released:
            self._num_top.pop(slot, None)
            self._prompt_top.pop(slot, None)
        for request in plan.admitted:
            self._note_logprobs(request)
            self._computed[request.slot] = request.num_computed
        if plan.decode_leaves or plan.decode_joins:
            self._decoding[plan.decode_leaves] = False
            self._decoding[plan.decode_joins] = True
            self._decode_slots = torch.from_numpy(np.flatnonzero(self._decoding))

    def _note_logprobs(self, request: Request) -> None:
        assert isinstance(request.payload, NewRequest), "the engine submits NewRequests"
        params = request.payload.params
        if params.logprobs is not None:
            self._num_top[request.slot] = params.logprobs
        if params.prompt_logprobs is not None:
            self._prompt_top[request.slot] = (len(request.prompt), params.prompt_logprobs)

    def _batch(self, prefill: list[PrefillChunk]) -> ForwardBatch:
        """Rows: every decoding slot, then the chunks. Tokens come from the table on the device."""
        table, decodes = self._table, self._decode_slots
        chunk_slots = torch.tensor([chunk.slot for chunk in prefill], dtype=torch.int64)
        lengths = torch.tensor([chunk.length for chunk in prefill], dtype=torch.int64)
        slots = torch.cat([decodes, chunk_slots])  # [R]
        starts = [torch.arange(chunk.start, chunk.start + chunk.length) for chunk in prefill]
        token_slots = torch.cat([decodes, chunk_slots.repeat_interleave(lengths)])  # [T]
        positions = torch.cat([table.computed[decodes], *starts])  # [T]
        blocks = table.block_table[token_slots, positions // self._block_size]
        query_lens = torch.cat([torch.ones(len(decodes), dtype=torch.int64), lengths])  # [R]
        query_start = torch.zeros(len(slots) + 1, dtype=torch.int32)
        query_start[1:] = query_lens.cumsum(0)
        self._computed[decodes.numpy()] += 1
        for chunk in prefill:
            self._computed[chunk.slot] = chunk.start + chunk.length
        context_lens = torch.from_numpy(self._computed[slots.numpy()]).to(torch.int32)
        table.computed[slots] = context_lens.long()
        return ForwardBatch(
            token_ids=table.tokens[token_slots, positions],
            positions=positions,
            write_index=blocks.long() * self._block_size + positions % self._block_size,
            attention=AttentionBatch(
                block_table=table.block_table,
                slots=slots,
                query_start=query_start,
                context_lens=context_lens,
                max_query_len=int(query_lens.max()),
                max_context_len=int(context_lens.max()),
                num_decodes=len(decodes),
            ),
        )

    # ------------------------------------------------------------ hidden states -> tokens

    def _draw(self, plan: StepPlan, batch: ForwardBatch, hidden: torch.Tensor) -> LaunchedStep:
        """Draw the next token of every decoding row and of every chunk that ends its prompt."""
        table, num_decodes = self._table, batch.attention.num_decodes
        samples = [True] * num_decodes + [chunk.samples for chunk in plan.prefill]
        rows = torch.tensor(samples).nonzero()[:, 0]  # [N] of the batch's rows
        last_token = batch.attention.query_start[1:][rows].long() - 1  # [N] of the batch's tokens
        slots = batch.attention.slots[rows]
        positions = batch.positions[last_token] + 1  # of the tokens to draw
        num_top = {s: n for s in slots.tolist() if (n := self._num_top.get(s)) is not None}
        sampled = self._operations.sample(
            self._model.logits(hidden[last_token]),
            slots,
            positions,
            table.sampling,
            num_top=max(num_top.values(), default=0),
            want_logprobs=bool(num_top),
        )
        table.tokens[slots, positions] = sampled.token_ids
        table.sampling.record(slots, sampled.token_ids)
        stop_ids = table.sampling.stop_ids[slots]  # [N, K]
        stopped = (stop_ids == sampled.token_ids[:, None]).any(dim=1)
        return LaunchedStep(plan.step, slots, sampled, stopped, num_top)

    def _score_prompt(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[TokenLogprobs]:
        """Scores of the prompt tokens that follow the chunk's positions."""
        num_prompt, num_top = self._prompt_top[chunk.slot]
        end = min(chunk.start + chunk.length + 1, num_prompt)
        targets = self._table.tokens[chunk.slot, chunk.start + 1 : end]
        return prompt_logprobs(hidden[: len(targets)], targets, num_top, self._model.logits)
