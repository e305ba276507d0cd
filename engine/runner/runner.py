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
from millrace.engine.runner.device_step import DeviceStep, Score
from millrace.engine.runner.graphs import DecodeCalls, StepShape
from millrace.engine.runner.logprobs import ScoredTokens, score_prompt
from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import Views
from millrace.kernels.sampling import SampledTokens
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import Request

Scored = dict[int, ScoredTokens]


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on their way to the host."""

    step: int
    slots: Slots  # [N], of the rows that drew a token
    drawn: Arrival  # i64 [3, max_rows]: token id, stopped, ok; the first N columns
    scored: Scored = field(default_factory=dict)
    """slot -> its token with its logprobs, where asked for"""
    prompts: dict[int, tuple[int, list[ScoredTokens]]] = field(default_factory=dict)
    """slot -> (first position scored, that position on)"""

    def result(self) -> StepResult:
        """Wait for the tokens."""
        token_ids, stopped, ok = self.drawn.wait()[:, : len(self.slots)]
        return StepResult(self.step, self.slots, token_ids, stopped != 0, ok != 0)

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the drawn tokens, by slot, where asked for."""
        return {slot: scored.read()[0] for slot, scored in self.scored.items()}

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
        self._moves = moves
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
        self._processed: set[int] = set()  # the slots among them that want processed ones
        self._prompt_top: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, alternatives)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> LaunchedStep:
        """Launch one step; the plan's changes are applied even if computing then fails."""
        rows = self._tell(plan)
        self._moves.run(plan, rows)
        self._length[self._decode_slots] += 1
        scored: Scored = {}
        if not plan.prefill:
            self._decode(self._scorer(self._decode_slots, scored))
            return self._launched(plan, self._decode_slots, scored)
        for chunk in plan.prefill:
            self._length[chunk.slot] = chunk.start + chunk.length
        drawing = [chunk.slot for chunk in plan.prefill if chunk.samples]
        slots = np.concatenate([self._decode_slots, np.array(drawing, np.int64)])
        hidden = self._mixed(rows, plan.prefill, self._scorer(slots, scored))
        launched = self._launched(plan, slots, scored)
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
        self._processed.clear()
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
            self._processed.discard(slot)
            self._prompt_top.pop(slot, None)
        for request in plan.admitted:
            self._plain[request.slot] = is_plain(request)
            self._note_logprobs(request)
        packed = PackedArrays()
        self._packer.table_changes(plan, packed)
        self._moves.pack(plan, packed)
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
            if params.logprobs_mode == "processed":
                self._processed.add(request.slot)
        if params.prompt_logprobs is not None:
            self._prompt_top[request.slot] = (len(request.prompt), params.prompt_logprobs)

    # ------------------------------------------------------------ launching

    def _decode(self, score: Score | None) -> None:
        """One token for each decoding slot."""
        slots = self._decode_slots
        plain = score is None and bool(self._plain[slots].all())
        shape = self._calls.fit(StepShape(len(slots), int(self._length[slots].max()), plain))
        if score is None:
            self._calls.replay(shape)
        else:  # a graph keeps its logits to itself
            self._step.decode(shape, score)

    def _mixed(self, rows: Views, prefill: list[PrefillChunk], score: Score | None) -> torch.Tensor:
        slots = [*self._decode_slots.tolist(), *(chunk.slot for chunk in prefill)]
        return self._step.mixed(
            rows,
            num_decodes=len(self._decode_slots),
            max_query=max(chunk.length for chunk in prefill),
            max_context=int(self._length[slots].max()),
            plain=bool(self._plain[slots].all()),
            score=score,
        )

    def _launched(self, plan: StepPlan, slots: Slots, scored: Scored) -> LaunchedStep:
        """Send the drawn tokens on their way."""
        drawn = self._table.drawn  # fetched whole: a part would be gathered on the device first
        return LaunchedStep(plan.step, slots, self._copies.fetch(drawn), scored)

    # ------------------------------------------------------------ scores

    def _scorer(self, host_slots: Slots, scored: Scored) -> Score | None:
        """Fills `scored` when the step draws; None where nobody asked for logprobs."""
        asked = [(row, s) for row, s in enumerate(host_slots.tolist()) if s in self._num_top]
        if not asked:
            return None

        def score(
            logits: torch.Tensor,
            slots: torch.Tensor,
            positions: torch.Tensor,
            sampled: SampledTokens,
        ) -> None:
            for row, slot in asked:  # a row at a time: only who asks pays
                one, drawn, num_top = slice(row, row + 1), sampled.row(row), self._num_top[slot]
                if slot in self._processed:
                    logprobs = self._operations.processed_logprobs(
                        *(logits[one], slots[one], positions[one], self._table.sampling),
                        *(drawn, num_top),
                    )
                else:
                    logprobs = self._operations.raw_logprobs(logits[one], drawn.token_ids, num_top)
                scored[slot] = ScoredTokens(drawn.token_ids, logprobs)

        return score

    def _score_prompt(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[ScoredTokens]:
        """Scores of the prompt tokens that follow the chunk's positions."""
        num_prompt, num_top = self._prompt_top[chunk.slot]
        end = min(chunk.start + chunk.length + 1, num_prompt)
        targets = self._table.tokens[chunk.slot, chunk.start + 1 : end].clone()
        return score_prompt(
            hidden[: len(targets)], targets, num_top, self._step.model.logits, self._operations
        )
