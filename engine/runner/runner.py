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
import numpy.typing as npt
import torch

from millrace.engine.core.messages import NewRequest, TokenLogprobs
from millrace.engine.errors import DeviceLost
from millrace.engine.runner.block_moves import BlockMoves
from millrace.engine.runner.changes import ChangePacker, Slots, is_plain
from millrace.engine.runner.copies import Arrival, Copies
from millrace.engine.runner.device_step import DeviceStep
from millrace.engine.runner.graphs import DecodeCalls, Draws, StepShape
from millrace.engine.runner.logprobs import ScoredTokens, read_scores, score_prompt
from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import DRAWN_ROWS, Views
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Request


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on their way to the host."""

    step: int
    slots: Slots  # [N], of the rows that drew a token
    drawn: Arrival  # the table's `results`, or `drawn` where nobody asked for logprobs
    asked: dict[int, int] = field(default_factory=dict)
    """row that wants logprobs -> alternatives wanted"""
    prompts: dict[int, tuple[int, list[ScoredTokens]]] = field(default_factory=dict)
    """slot -> (first position scored, that position on)"""
    _arrived: npt.NDArray[np.int64] | None = field(default=None, init=False)

    def result(self) -> StepResult:
        """Wait for the tokens; to be called once, and before `logprobs`."""
        self._arrived = self.drawn.wait()[:, : len(self.slots)]
        token_ids, stopped, ok = self._arrived[:DRAWN_ROWS]
        return StepResult(self.step, self.slots, token_ids, stopped != 0, ok != 0)

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the drawn tokens, by slot, where asked for."""
        if not self.asked:
            return {}
        assert self._arrived is not None, "result() comes first"
        entries = read_scores(self._arrived[0], self._arrived[DRAWN_ROWS:], self.asked)
        return dict(zip(self.slots[list(self.asked)].tolist(), entries, strict=True))

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
            self._decode()
            return self._launched(plan, self._decode_slots)
        for chunk in plan.prefill:
            self._length[chunk.slot] = chunk.start + chunk.length
        drawing = [chunk.slot for chunk in plan.prefill if chunk.samples]
        slots = np.concatenate([self._decode_slots, np.array(drawing, np.int64)])
        hidden = self._mixed(rows, plan.prefill, self._draws(slots))
        launched = self._launched(plan, slots)
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

    def _decode(self) -> None:
        """One token for each decoding slot."""
        slots = self._decode_slots
        shape = StepShape(len(slots), int(self._length[slots].max()), self._draws(slots))
        self._calls.replay(self._calls.fit(shape))

    def _mixed(self, rows: Views, prefill: list[PrefillChunk], draws: Draws) -> torch.Tensor:
        """Decodes and chunks of prompts; returns the hidden states [T, E]."""
        slots = [*self._decode_slots.tolist(), *(chunk.slot for chunk in prefill)]
        return self._step.mixed(
            rows,
            num_decodes=len(self._decode_slots),
            max_query=max(chunk.length for chunk in prefill),
            max_context=int(self._length[slots].max()),
            draws=draws,
        )

    def _draws(self, slots: Slots) -> Draws:
        """The most that any of the slots that will draw asks for."""
        if not self._num_top.keys().isdisjoint(slots.tolist()):
            return Draws.SCORED
        return Draws.PLAIN if self._plain[slots].all() else Draws.FILTERED

    def _launched(self, plan: StepPlan, slots: Slots) -> LaunchedStep:
        """Send what was drawn on its way, before another step writes to the same place.

        Fetched for all rows that a step can have: a part would be gathered on the device first.
        """
        asked = self._asked(slots)
        drawn = self._table.results if asked else self._table.drawn
        return LaunchedStep(plan.step, slots, self._copies.fetch(drawn), asked)

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
