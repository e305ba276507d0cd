"""FakeRunner: a device that knows the plans and nothing else, and distrusts them.

It keeps what a real runner keeps by slot (tokens, table, length, the decoding set), and drafts
tokens of which some are wrong, where it is asked to. In place of KV
it writes, for each position, the hash of all tokens up to there; so when a position is computed,
one comparison shows whether every position before it is found in the blocks of its own table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from millrace.perf.sim.script import NO_PREFIX, Script, draw, extend, guess
from millrace.scheduler.limits import Limits
from millrace.scheduler.plan import StepPlan, StepResult
from millrace.scheduler.request import Request

POISON = -1


@dataclass(slots=True)
class Sequence:
    """The state of one occupied slot. The tokens drawn here are never told by the host."""

    request: Request
    tokens: list[int]
    prefix: list[int]  # hash of each known position
    table: list[int] = field(default_factory=list)
    given: int = 0  # tokens known at its admission
    computed: int | None = None  # None: its first chunk has not come yet

    @property
    def is_prefilled(self) -> bool:
        return self.computed is not None and self.computed >= self.given

    def append(self, token: int) -> None:
        self.prefix.append(extend(self.prefix[-1] if self.prefix else NO_PREFIX, token))
        self.tokens.append(token)

    @property
    def script(self) -> Script:
        script = self.request.payload
        assert isinstance(script, Script)
        return script

    def forget(self, num_tokens: int) -> None:
        """All tokens but the first ones: the others were drafts."""
        del self.tokens[num_tokens:], self.prefix[num_tokens:]


@dataclass(frozen=True, slots=True)
class Work:
    """Positions [start, start + length) of a slot, computed in one step."""

    slot: int
    start: int
    length: int
    samples: bool
    is_drafted: bool = False  # but for the first of them


class FakeRunner:
    """Executes steps at once, in order; the world decides when the host hears of the results."""

    def __init__(self, limits: Limits) -> None:
        self.block_size, self.window = limits.block_size, limits.window
        self.kv = np.full(limits.num_blocks * limits.block_size, POISON, np.int64)
        self.host = np.full((limits.host_blocks, limits.block_size), POISON, np.int64)
        self.slots: dict[int, Sequence] = {}
        self.decoding: set[int] = set()
        self.drafting: dict[int, set[int]] = {}  # slots, by step not landed
        self._readers: dict[int, dict[int, set[int]]] = {}  # step not landed -> block -> requests

    def execute(self, plan: StepPlan) -> StepResult:
        """Check the plan against the mirrored state, compute it, and draw the tokens."""
        self._change_slots(plan)
        self._change_decoding(plan)
        self._move_blocks(plan)
        work = [Work(c.slot, c.start, c.length, c.samples) for c in plan.prefill]
        for slot in sorted(self.decoding):
            computed = self.slots[slot].computed
            assert self.slots[slot].is_prefilled, f"slot {slot} decodes before its prompt"
            assert computed is not None, "what is prefilled is computed"
            work.append(Work(slot, computed, 1, True))
        work += [self._draft(*row) for row in plan.drafts.tolist()]
        slots = [item.slot for item in work]
        assert len(set(slots)) == len(slots), f"a slot has two roles: {slots}"
        written: set[int] = set()
        for item in work:
            self._write(item, written)
        readers: dict[int, set[int]] = {}
        for item in work:
            self._read(item)
            sequence = self.slots[item.slot]
            for block in sequence.table[self._first_read(item) // self.block_size :]:
                readers.setdefault(block, set()).add(sequence.request.id)
        self._readers[plan.step] = readers
        self.drafting[plan.step] = set(plan.drafts[:, 0].tolist())
        return self._sample(plan.step, [item for item in work if item.samples])

    def land(self, step: int) -> None:
        """The host has the step's result, so the device is done with its blocks."""
        del self._readers[step], self.drafting[step]

    def lose(self) -> None:
        """Steps in flight are lost, no KV can be trusted, and no slot decodes any more."""
        self._readers.clear()
        self.drafting.clear()
        self.decoding.clear()
        self.kv[:] = self.host[:] = POISON

    def holds(self, tokens: list[int], blocks: list[int]) -> bool:
        """Whether these blocks hold exactly the KV of these tokens, as far as they go."""
        sequence = Sequence(None, [], [])  # type: ignore[arg-type]
        for token in tokens:
            sequence.append(token)
        end = min(len(tokens), len(blocks) * self.block_size)
        found: list[int] = self._at(blocks, end).tolist()
        return found == sequence.prefix[:end]

    def _change_slots(self, plan: StepPlan) -> None:
        for slot in plan.released:
            assert slot in self.slots, f"slot {slot} is released, but empty"
            del self.slots[slot]
        for request in plan.admitted:
            assert request.slot not in self.slots, f"slot {request.slot} is admitted to twice"
            self.slots[request.slot] = sequence = Sequence(request, [], [])
            for token in request.known_tokens().tolist():
                sequence.append(token)
            sequence.given = len(sequence.tokens)
        for slot, index, block in plan.block_appends.tolist():
            table = self.slots[slot].table
            assert index == len(table), f"slot {slot}: block {index} comes after {len(table)}"
            table.append(block)

    def _move_blocks(self, plan: StepPlan) -> None:
        """Out, across, in; of the copies all are read before any is written."""
        blocks, copies = self.kv.reshape(-1, self.block_size), plan.block_copies
        for block, place in plan.swap_outs:
            self.host[place] = blocks[block]
        sources, destinations = [pair[0] for pair in copies], [pair[1] for pair in copies]
        written = [*destinations, *(block for _, block in plan.swap_ins)]
        assert len(set(written)) == len(written), f"blocks are moved to twice: {written}"
        blocks[destinations] = blocks[sources]
        for place, block in plan.swap_ins:
            blocks[block] = self.host[place]

    def _change_decoding(self, plan: StepPlan) -> None:
        leaves, joins = set(plan.decode_leaves), set(plan.decode_joins)
        assert leaves <= self.decoding, f"{leaves - self.decoding} leave, but did not decode"
        assert not joins & self.decoding, f"{joins & self.decoding} join, but decode already"
        self.decoding = self.decoding - leaves | joins
        assert self.decoding <= self.slots.keys(), f"empty slots decode: {self.decoding}"
        assert len(self.decoding) == plan.num_decodes, f"num_decodes is {plan.num_decodes}"

    def _draft(self, slot: int, start: int, length: int) -> Work:
        """Guess the tokens behind a slot's last one, to be computed together with it."""
        sequence, where = self.slots[slot], f"slot {slot}, {length} tokens from {start}"
        assert not any(slot in others for others in self.drafting.values()), f"{where}: in flight"
        assert sequence.is_prefilled and start == sequence.computed, f"{where}: {sequence.computed}"
        assert 1 <= length <= 1 + sequence.request.lookahead, f"{where}: too long"
        assert start + length < sequence.request.max_length, f"{where}: past its end"
        while len(sequence.tokens) < start + length:
            sequence.append(guess(sequence.prefix[-1], sequence.script))
        return Work(slot, start, length, True, is_drafted=True)

    def _write(self, work: Work, written: set[int]) -> None:
        sequence, end = self.slots[work.slot], work.start + work.length
        where = f"slot {work.slot}, positions {work.start} to {end}"
        assert work.length > 0, f"{where}: nothing to compute"
        # Only a first chunk may start anywhere: behind what the prefix cache gave.
        assert sequence.computed in (None, work.start), f"{where}: {sequence.computed} computed"
        if sequence.computed is None:
            given = self._at(sequence.table, work.start).tolist()
            is_right = given == sequence.prefix[: work.start]
            assert is_right, f"{where}: what it begins behind is another's"
        assert end <= len(sequence.tokens), f"{where}: {len(sequence.tokens)} tokens are known"
        is_whole = end == len(sequence.tokens)
        assert work.samples == is_whole, f"{where}: samples must be {is_whole}"
        assert end <= len(sequence.table) * self.block_size, f"{where}: past its block table"
        for position in range(work.start, end):
            block, offset = divmod(position, self.block_size)
            self._check_owned(sequence.table[block], sequence.request.id)
            address = sequence.table[block] * self.block_size + offset
            assert address not in written, f"{where}: two requests write block {block}"
            written.add(address)
            self.kv[address] = sequence.prefix[position]
        sequence.computed = end

    def _check_owned(self, block: int, writer: int) -> None:
        for step, readers in self._readers.items():
            others = readers.get(block, set()) - {writer}
            assert not others, f"request {writer} writes block {block}, step {step} of {others}"

    def _read(self, work: Work) -> None:
        sequence, end = self.slots[work.slot], work.start + work.length
        first = self._first_read(work)
        found, wanted = self._at(sequence.table, end)[first:], sequence.prefix[first:end]
        if found.tolist() != wanted:
            wrong = (np.flatnonzero(found != np.asarray(wanted)) + first).tolist()
            raise AssertionError(f"slot {work.slot} reads wrong KV at positions {wrong}")

    def _first_read(self, work: Work) -> int:
        """The first position that the first of these reads."""
        return 0 if self.window is None else max(0, work.start - self.window + 1)

    @property
    def is_busy(self) -> bool:
        """Whether steps are in flight."""
        return bool(self._readers)

    def _at(self, table: list[int], end: int) -> np.ndarray:
        rows = self.kv.reshape(-1, self.block_size)[table]
        return rows.reshape(-1)[:end]

    def _sample(self, step: int, work: list[Work]) -> StepResult:
        slots, tokens, stopped, ok = [], [], [], []
        for item in work:
            sequence = self.slots[item.slot]
            for token in self._kept(sequence, item):
                index = len(sequence.tokens) - len(sequence.request.prompt)
                sequence.append(token)  # the device goes on even when the host will not
                slots.append(item.slot)
                tokens.append(token)
                stopped.append(token in sequence.script.stop_tokens)
                ok.append(index != sequence.script.fails_at)
        return StepResult(
            step,
            np.asarray(slots, np.int64),
            np.asarray(tokens, np.int64),
            np.asarray(stopped, np.bool_),
            np.asarray(ok, np.bool_),
        )

    def _kept(self, sequence: Sequence, work: Work) -> list[int]:
        """The drafts that are right, and the token behind them; the others are taken back."""
        seed = sequence.script.seed
        if not work.is_drafted:
            return [draw(sequence.prefix[-1], seed)]
        drawn = [draw(prefix, seed) for prefix in sequence.prefix[work.start :]]
        drafts = sequence.tokens[work.start + 1 :]
        num_right = 0
        while num_right < len(drafts) and drafts[num_right] == drawn[num_right]:
            num_right += 1
        sequence.forget(work.start + 1)
        sequence.computed = work.start + 1 + num_right
        return drawn[: num_right + 1]
