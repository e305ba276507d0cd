"""Runner (5 of 8): carries out a StepPlan: tells the device what changed, launches, fetches tokens.

Knows slots, not requests' owners. The tokens that a step draws stay on the device, as the next
step's input; `LaunchedStep.result()` is the only place where the host waits for them. A step in
which the same slots go on decoding sends nothing and is one call (on CUDA one graph replay).

Before it: scheduler/scheduler.py, which made the plan. After it: engine/models/decoder.py, through
device_step.py beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from millrace.engine.core.messages import NewRequest, TokenLogprobs
from millrace.engine.errors import DeviceLost
from millrace.engine.runner.block_moves import BlockMoves
from millrace.engine.runner.changes import ChangePacker, Slots, is_plain
from millrace.engine.runner.copies import Arrival, Copies
from millrace.engine.runner.device_step import DeviceStep
from millrace.engine.runner.graphs import DecodeCalls, StepShape
from millrace.engine.runner.logprobs import ScoredTokens, score_prompt
from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import Views
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Request


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on their way to the host."""

    step: int
    slots: Slots  # [N], of the rows that drew a token
    drawn: Arrival  # i64 [3, max_rows]: token id, stopped, ok; the first N columns
    scored: ScoredTokens | None = None
    """the N tokens with their logprobs, if anybody asked for some"""
    asked: dict[int, int] = field(default_factory=dict)
    """row of `scored` -> alternatives wanted"""
    prompts: dict[int, tuple[int, list[ScoredTokens]]] = field(default_factory=dict)
    """slot -> (first position scored, that position on)"""

    def result(self) -> StepResult:
        """Wait for the tokens."""
        token_ids, stopped, ok = self.drawn.wait()[:, : len(self.slots)]
        return StepResult(self.step, self.slots, token_ids, stopped != 0, ok != 0)

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the drawn tokens, by slot, where asked for."""
        if self.scored is None:
            return {}
        slots = self.slots[list(self.asked)].tolist()
        return dict(zip(slots, self.scored.read_rows(self.asked), strict=True))

    def prompt_logprobs(self) -> dict[int, tuple[int, list[TokenLogprobs]]]:
        """By slot, where asked for: the first position scored, and the scores from there on."""
        return {
            slot: (start, [entry for part in parts for entry in part.read()])
            for slot, (start, parts) in self.prompts.items()
        }


class Runner:
    """One model on one device, with its KV cache and the table of running requests."""

    def __init__(
        self, step: DeviceStep, calls: DecodeCalls, copies: Copies, moves: BlockMoves
    ) -> None:
        self._step = step
        self.moves = moves
        self._calls = calls
        self._operations = step.operations
        self._copies = copies
        self._table = table = step.table
        num_slots = table.scratch_slot
        self._packer = ChangePacker(
            table.tokens.shape[1], table.block_table.shape[1], table.sampling.vocab
        )
        self._decodes = np.zeros(num_slots, np.bool_)
        self._decode_slots = np.zeros(0, np.int64)  # the same as indices, in ascending order
        self._length = np.zeros(num_slots, np.int64)  # tokens computed, at most
        self._plain = np.zeros(num_slots, np.bool_)  # draws by temperature alone
        self._num_top: dict[int, int] = {}  # slot -> output logprobs wanted
        self._prompt_top: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, alternatives)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> LaunchedStep:
        """Launch one step; the plan's changes are applied even if computing then fails."""
        rows = self._tell(plan)
        self.moves.run(plan, rows)
        self._length[self._decode_slots] += 1
        if not plan.prefill:
            asked = self._asked(self._decode_slots)
            return self._launched(plan, self._decode_slots, self._decode(asked), asked)
        for chunk in plan.prefill:
            self._length[chunk.slot] = chunk.start + chunk.length
        drawing = [chunk.slot for chunk in plan.prefill if chunk.samples]
        slots = np.concatenate([self._decode_slots, np.array(drawing, np.int64)])
        asked = self._asked(slots)
        hidden, scored = self._mixed(rows, plan.prefill, asked)
        launched = self._launched(plan, slots, scored, asked)
        end = len(self._decode_slots)
        for chunk in plan.prefill:
            start, end = end, end + chunk.length
            if chunk.slot in self._prompt_top:
                prompt = self._score_prompt(chunk, hidden[start:end])
                launched.prompts[chunk.slot] = (chunk.start + 1, prompt)
        return launched

    def recover(self) -> None:
        """A step failed, and the scheduler has ended all that ran: no slot means anything now.

        What is left in the table is overwritten when a request comes to its slot. A kernel that
        faults takes the whole CUDA context with it: then the device answers this process never
        again, and DeviceLost is raised.
        """
        self._decodes[:] = False
        self._decode_slots = np.zeros(0, np.int64)
        self._num_top.clear()
        self._prompt_top.clear()
        try:
            self._copies.settle()
        except Exception as error:
            raise DeviceLost(f"the device is lost to this process: {error}") from error

    # ------------------------------------------------------------ what the device must be told

    def _tell(self, plan: StepPlan) -> Views:
        """Send what changed, if anything did; returns the arrays as they are on the device."""
        for slot in plan.released:
            self._num_top.pop(slot, None)
            self._prompt_top.pop(slot, None)
        for request in plan.admitted:
            self._plain[request.slot] = is_plain(request)
            self._note_logprobs(request)
        packed = PackedArrays()
        self._packer.table_changes(plan, packed)
        self.moves.pack(plan, packed)
        if plan.decode_leaves or plan.decode_joins:
            self._decodes[plan.decode_leaves] = False
            self._decodes[plan.decode_joins] = True
            self._decode_slots = np.flatnonzero(self._decodes)
            padded = np.full(len(self._decodes), self._table.scratch_slot, np.int64)
            padded[: len(self._decode_slots)] = self._decode_slots
            packed.add("decode_slots", padded)
        if plan.prefill:
            self._packer.chunk_rows(self._decode_slots, plan.prefill, packed)
        if packed.num_bytes == 0:
            return {}
        arrived = packed.views(self._copies.send(packed))
        self._table.apply(arrived)
        return arrived

    def _note_logprobs(self, request: Request) -> None:
        assert isinstance(request.payload, NewRequest), "the engine submits NewRequests"
        params = request.payload.params
        if params.logprobs is not None:
            self._num_top[request.slot] = params.logprobs
        if params.prompt_logprobs is not None:
            self._prompt_top[request.slot] = (len(request.prompt), params.prompt_logprobs)

    # ------------------------------------------------------------ launching

    def _decode(self, asked: dict[int, int]) -> ScoredTokens | None:
        """One token for each decoding slot."""
        slots = self._decode_slots
        plain = not asked and bool(self._plain[slots].all())
        shape = self._calls.fit(StepShape(len(slots), int(self._length[slots].max()), plain))
        if asked:  # graphs are recorded without logprobs
            return self._step.decode(shape, max(asked.values()))
        self._calls.replay(shape)
        return None

    def _mixed(
        self, rows: Views, prefill: list[PrefillChunk], asked: dict[int, int]
    ) -> tuple[torch.Tensor, ScoredTokens | None]:
        slots = [*self._decode_slots.tolist(), *(chunk.slot for chunk in prefill)]
        return self._step.mixed(
            rows,
            num_decodes=len(self._decode_slots),
            max_query=max(chunk.length for chunk in prefill),
            max_context=int(self._length[slots].max()),
            num_top=max(asked.values(), default=None),
            plain=bool(self._plain[slots].all()),
        )

    def _launched(
        self, plan: StepPlan, slots: Slots, scored: ScoredTokens | None, asked: dict[int, int]
    ) -> LaunchedStep:
        """Send the drawn tokens on their way."""
        drawn = self._table.drawn  # fetched whole: a part would be gathered on the device first
        return LaunchedStep(plan.step, slots, self._copies.fetch(drawn), scored, asked)

    # ------------------------------------------------------------ scores

    def _asked(self, slots: Slots) -> dict[int, int]:
        """Of the rows that will draw, those that want logprobs: row -> alternatives wanted."""
        if not self._num_top:
            return {}
        rows = enumerate(slots.tolist())
        return {row: self._num_top[slot] for row, slot in rows if slot in self._num_top}

    def _score_prompt(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[ScoredTokens]:
        """Scores of the prompt tokens that follow the chunk's positions."""
        num_prompt, num_top = self._prompt_top[chunk.slot]
        end = min(chunk.start + chunk.length + 1, num_prompt)
        targets = self._table.tokens[chunk.slot, chunk.start + 1 : end].clone()
        return score_prompt(
            hidden[: len(targets)], targets, num_top, self._step.model.logits, self._operations
        )
