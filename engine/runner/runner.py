"""Runner (5 of 8): turns a StepPlan into device tensors, one forward pass and one draw.

Knows slots, not requests' owners. The tokens it draws stay on the device, as the next step's input;
`LaunchedStep.result()` is the only place where the host waits for them.

Before it: scheduler/scheduler.py, which made the plan. After it: engine/models/decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from millrace.engine.core.messages import NewRequest, TokenLogprobs
from millrace.engine.models.decoder import Decoder
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.runner.logprobs import prompt_logprobs, token_logprobs
from millrace.engine.runner.request_table import RequestTable
from millrace.kernels.attention import AttentionBatch
from millrace.kernels.dispatch import Operations
from millrace.kernels.logprobs import RawLogprobs
from millrace.kernels.sampling import SampledTokens
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Request


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on their way to the host."""

    step: int
    slots: npt.NDArray[np.int64]  # [N], of the rows that drew a token
    sampled: SampledTokens
    stopped: torch.Tensor  # bool [N]
    scored: dict[int, tuple[torch.Tensor, RawLogprobs]] = field(default_factory=dict)
    """slot -> (its token i64 [1], logprobs of that one row), where asked for"""
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    """slot -> (first position scored, scores of that position on)"""

    def result(self) -> StepResult:
        """Wait for the tokens."""
        return StepResult(
            self.step,
            self.slots,
            self.sampled.token_ids.cpu().numpy(),
            self.stopped.cpu().numpy(),
            self.sampled.ok.cpu().numpy(),
        )

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the drawn tokens, by slot, where asked for."""
        return {
            slot: token_logprobs(token_id, raw)[0] for slot, (token_id, raw) in self.scored.items()
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
        self._device = table.computed.device
        self._block_size = kv.keys[0].shape[1]
        num_slots = len(table.computed)
        self._decodes = np.zeros(num_slots, np.bool_)
        self._decode_slots = np.zeros(0, np.int64)  # the same as indices, in ascending order
        self._length = np.zeros(num_slots, np.int64)  # the host's copy of table.computed
        self._num_top: dict[int, int] = {}  # slot -> output logprobs wanted
        self._processed: set[int] = set()  # the slots among them that want processed ones
        self._prompt_top: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, alternatives)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> LaunchedStep:
        """Launch one step; the plan's changes are applied even if computing then fails."""
        self._update(plan)
        batch = self._batch(plan.prefill)
        hidden = self._model.forward(batch, self._kv)
        launched = self._draw(plan, batch, hidden)
        end = plan.num_decodes
        for chunk in plan.prefill:
            start, end = end, end + chunk.length
            if chunk.slot in self._prompt_top:
                scored = self._score_prompt(chunk, hidden[start:end])
                launched.prompt_logprobs[chunk.slot] = (chunk.start + 1, scored)
        return launched

    def forget_decodes(self) -> None:
        """No slot decodes any more: the scheduler has abandoned the launched steps."""
        self._decodes[:] = False
        self._decode_slots = np.zeros(0, np.int64)

    # ------------------------------------------------------------ plan -> tensors

    def _update(self, plan: StepPlan) -> None:
        self._table.update(plan)
        for slot in plan.released:
            self._num_top.pop(slot, None)
            self._processed.discard(slot)
            self._prompt_top.pop(slot, None)
        for request in plan.admitted:
            self._note_logprobs(request)
        for chunk in plan.prefill:
            self._length[chunk.slot] = chunk.start
        if plan.decode_leaves or plan.decode_joins:
            self._decodes[plan.decode_leaves] = False
            self._decodes[plan.decode_joins] = True
            self._decode_slots = np.flatnonzero(self._decodes)

    def _note_logprobs(self, request: Request) -> None:
        assert isinstance(request.payload, NewRequest), "the engine submits NewRequests"
        params = request.payload.params
        if params.logprobs is not None:
            self._num_top[request.slot] = params.logprobs
            if params.logprobs_mode == "processed":
                self._processed.add(request.slot)
        if params.prompt_logprobs is not None:
            self._prompt_top[request.slot] = (len(request.prompt), params.prompt_logprobs)

    def _batch(self, prefill: list[PrefillChunk]) -> ForwardBatch:
        """Rows: every decoding slot with one token, then the chunks with theirs.

        Which positions these are, and which tokens, the table knows: a row goes on where its slot
        has stopped.
        """
        table, num_decodes = self._table, len(self._decode_slots)
        host_slots = np.concatenate([self._decode_slots, [chunk.slot for chunk in prefill]])
        host_lens = np.concatenate([np.ones(num_decodes), [chunk.length for chunk in prefill]])
        self._length[host_slots.astype(np.int64)] += host_lens.astype(np.int64)
        slots, query_lens = self._to_device(host_slots), self._to_device(host_lens)  # [R]
        starts = table.computed[slots]
        query_start = torch.zeros(len(slots) + 1, dtype=torch.int64, device=self._device)
        torch.cumsum(query_lens, 0, out=query_start[1:])
        num_tokens = int(host_lens.sum())
        rows = torch.arange(len(slots), device=self._device)
        rows = rows.repeat_interleave(query_lens, output_size=num_tokens)  # [T]
        offsets = torch.arange(num_tokens, device=self._device) - query_start[rows]
        positions = starts[rows] + offsets  # [T]
        blocks = table.block_table[slots[rows], positions // self._block_size].long()
        context_lens = starts + query_lens
        table.computed[slots] = context_lens
        return ForwardBatch(
            token_ids=table.tokens[slots[rows], positions],
            positions=positions,
            write_index=blocks * self._block_size + positions % self._block_size,
            attention=AttentionBatch(
                block_table=table.block_table,
                slots=slots,
                query_start=query_start.to(torch.int32),
                context_lens=context_lens.to(torch.int32),
                max_query_len=int(host_lens.max()),
                max_context_len=int(self._length[host_slots.astype(np.int64)].max()),
                num_decodes=num_decodes,
            ),
        )

    # ------------------------------------------------------------ hidden states -> tokens

    def _draw(self, plan: StepPlan, batch: ForwardBatch, hidden: torch.Tensor) -> LaunchedStep:
        """Draw the next token of every decoding row and of every chunk that ends its prompt."""
        table = self._table
        chunks = [(plan.num_decodes + i, c.slot) for i, c in enumerate(plan.prefill) if c.samples]
        host_rows = np.array([*range(plan.num_decodes), *(row for row, _ in chunks)], np.int64)
        host_slots = np.array([*self._decode_slots, *(slot for _, slot in chunks)], np.int64)
        rows, slots = self._to_device(host_rows), self._to_device(host_slots)  # [N] of the batch
        last_token = batch.attention.query_start[1:][rows].long() - 1  # [N]
        positions = batch.positions[last_token] + 1  # of the tokens to draw
        logits = self._model.logits(hidden[last_token])  # [N, V]
        sampled = self._operations.sample(logits, slots, positions, table.sampling)
        scored = self._score_drawn(host_slots, logits, slots, positions, sampled)
        table.tokens[slots, positions] = sampled.token_ids
        table.sampling.record(slots, sampled.token_ids)
        stop_ids = table.sampling.stop_ids[slots]  # [N, K]
        stopped = (stop_ids == sampled.token_ids[:, None]).any(dim=1)
        return LaunchedStep(plan.step, host_slots, sampled, stopped, scored)

    def _score_drawn(
        self,
        host_slots: npt.NDArray[np.int64],
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        sampled: SampledTokens,
    ) -> dict[int, tuple[torch.Tensor, RawLogprobs]]:
        """Logprobs of the drawn tokens by slot, a row at a time: only who asks pays.

        Processed ones read the penalties' counts as the draw did, so before it is recorded.
        """
        scored: dict[int, tuple[torch.Tensor, RawLogprobs]] = {}
        for row, slot in enumerate(host_slots.tolist()):
            if slot not in self._num_top:
                continue
            one, drawn, num_top = slice(row, row + 1), sampled.row(row), self._num_top[slot]
            if slot in self._processed:
                logprobs = self._operations.processed_logprobs(
                    *(logits[one], slots[one], positions[one], self._table.sampling),
                    *(drawn, num_top),
                )
            else:
                logprobs = self._operations.raw_logprobs(logits[one], drawn.token_ids, num_top)
            scored[slot] = (drawn.token_ids, logprobs)
        return scored

    def _score_prompt(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[TokenLogprobs]:
        """Scores of the prompt tokens that follow the chunk's positions."""
        num_prompt, num_top = self._prompt_top[chunk.slot]
        end = min(chunk.start + chunk.length + 1, num_prompt)
        targets = self._table.tokens[chunk.slot, chunk.start + 1 : end]
        return prompt_logprobs(
            hidden[: len(targets)], targets, num_top, self._model.logits, self._operations
        )

    def _to_device(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)
