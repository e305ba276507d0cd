"""SlotTable: all that a step must know of the running requests, in arrays indexed by slot.

The host's counterpart of the table on the device. A step is a few operations on whole arrays, and
costs the same whether a request is old or new, long or short. Python visits a request when it comes
and when it goes.

S slots, C tokens of the longest sequence, M blocks of one. Untouched rows take no memory: the
operating system gives a page when it is first written.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import numpy.typing as npt

from millrace.scheduler.idle_blocks import BlockIds
from millrace.scheduler.prefix_cache import Chain
from millrace.scheduler.request import NEVER, NO_SLOT, Request

Slots = npt.NDArray[np.intp]
LOG_STEPS = 16  # whose tokens are written at once
LINE = 16  # int32 in a line of the processor's cache
ONE = np.array(1)  # an array operation takes half as long with it as with Python's 1
ONE.flags.writeable = False


def row_length(length: int) -> int:
    """`length` or a little more: an odd number of cache lines.

    A column of such rows is spread over the whole cache. Rows of a power of two would all compete
    for a few places in it, and a step that writes one token a row was several times slower.
    """
    return (-(-length // LINE) | 1) * LINE


class SlotTable:
    """Who owns which slot, and how far it is. Changed by the scheduler alone."""

    def __init__(self, num_slots: int, max_context: int, block_size: int) -> None:
        max_blocks = -(-max_context // block_size)
        self.block_size = block_size
        self._block_size = np.array(block_size, np.int32)
        self.max_context = max_context
        self.requests: list[Request | None] = [None] * num_slots
        self.chains: list[Chain] = [Chain()] * num_slots  # what of its table is in the prefix cache
        self.free = list(range(num_slots - 1, -1, -1))
        self.ids = np.zeros(num_slots, np.int64)  # of the requests
        self.is_live = np.zeros(num_slots, np.bool_)  # owned by a request that has not ended
        self.decodes = np.zeros(num_slots, np.int32)  # tokens that a step computes: 0 or 1
        self.speculates = np.zeros(num_slots, np.int32)  # 1: it drafts, and no draft is in flight
        self.lookahead = np.zeros(num_slots, np.int32)  # drafts at most
        self.num_lookahead = 0  # slots with any
        self.computed = np.zeros(num_slots, np.int32)  # tokens whose KV is, or is being computed
        self.end = np.zeros(num_slots, np.int32)  # `computed` once the last token is drawn
        self.capacity = np.zeros(num_slots, np.int32)  # tokens that its blocks have room for
        self.num_gone = np.zeros(num_slots, np.int32)  # blocks behind its window, given back
        self.last_step = np.full(num_slots, NEVER, np.int64)  # newest launched, but for decodes
        self.block_table = np.zeros((num_slots, row_length(max_blocks)), np.int32)  # [S, >= M]
        # Into the flattened block table: where a slot's row begins, and where its next block goes.
        self._first_block = np.arange(num_slots) * row_length(max_blocks)
        self._next_block = self._first_block.copy()
        self._tokens = np.zeros(num_slots * row_length(max_context), np.int32)  # [S * (>= C)]
        # Into _tokens: where a slot's tokens begin, and where the next one goes.
        self._first_token = np.arange(num_slots) * row_length(max_context)
        self._next_token = self._first_token.copy()
        self._log: list[tuple[Slots, npt.NDArray[np.int32]]] = []  # drawn, and not yet written

    def occupy(self, request: Request, blocks: BlockIds, num_computed: int, chain: Chain) -> int:
        """Give a request a slot of its own; returns it."""
        slot = self.free.pop()
        known = request.known_tokens()
        request.slot = slot
        self.requests[slot], self.chains[slot] = request, chain
        self.ids[slot] = request.id
        self.is_live[slot] = True
        self.lookahead[slot] = request.lookahead
        self.num_lookahead += request.lookahead > 0
        self.computed[slot] = num_computed
        self.end[slot] = request.max_length - 1  # the last token's KV is never computed
        self.capacity[slot] = len(blocks) * self.block_size
        self.num_gone[slot] = 0
        self.block_table[slot, : len(blocks)] = blocks
        self._next_block[slot] = self._first_block[slot] + len(blocks)
        first = self._first_token[slot]
        self._next_token[slot] = first + len(known)
        self._tokens[first : first + len(known)] = known
        return slot

    def vacate(self, slot: int) -> None:
        """Its request has been released."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is free already"
        self.num_lookahead -= request.lookahead > 0
        request.slot = NO_SLOT
        self.requests[slot] = None
        self.is_live[slot] = False
        self.free.append(slot)

    def append(self, slots: Slots, token_ids: npt.NDArray[np.int64]) -> None:
        """One more token each, all slots different. `slots` must stay as it is from here on."""
        self._log.append((slots, token_ids.astype(np.int32)))
        if len(self._log) == LOG_STEPS:
            self._write_log()

    def append_runs(self, slots: Slots, token_ids: npt.NDArray[np.int64], first: Slots) -> None:
        """More tokens; a slot may come several times in a row, from row `first` on."""
        self._write_log()
        address = self._next_token[slots] + np.arange(len(slots)) - first
        self._tokens[address] = token_ids
        self._next_token[slots] = address + 1  # where a slot is repeated, its last row counts

    def drafting(self, stalled: list[int]) -> Slots:
        """Those that may check drafts in the next step, but for the stalled."""
        speculates = self.speculates.copy()
        speculates[stalled] = 0
        slots: Slots = speculates.nonzero()[0]
        return slots

    def is_stream(self, slot: int) -> bool:
        """Whether it can draw a token, or more, in the next step."""
        return bool(self.decodes[slot] or self.speculates[slot])

    def streams(self) -> npt.NDArray[np.int32]:
        """1 where `is_stream`."""
        return self.decodes + self.speculates

    def _write_log(self) -> None:
        """Put the drawn tokens in their rows.

        Steps of the same slots (the same array) are written together: the rows are far apart, and
        so the processor finds those of the next step near at hand.
        """
        for _, group in groupby(self._log, key=lambda step: id(step[0])):
            steps = list(group)
            slots = steps[0][0]
            address = self._next_token[slots]
            for _, token_ids in steps:
                self._tokens[address] = token_ids
                address += ONE
            self._next_token[slots] = address
        self._log.clear()

    def add_blocks(self, slots: Slots, blocks: BlockIds) -> Slots:
        """One more block each, all slots different; returns the blocks' indices in their tables."""
        place = self._next_block[slots]
        self.block_table.reshape(-1)[place] = blocks
        self._next_block[slots] = place + ONE
        self.capacity[slots] = self.capacity[slots] + self._block_size
        index: Slots = place - self._first_block[slots]
        return index

    def extend(self, slot: int, blocks: BlockIds) -> Slots:
        """More blocks for one slot; returns their indices in its table."""
        first = self.end_block(slot)
        end = first + len(blocks)
        self.block_table[slot, first:end] = blocks
        self._next_block[slot] += len(blocks)
        self.capacity[slot] = end * self.block_size
        return np.arange(first, end)

    def drop_blocks(self, slot: int, end: int) -> BlockIds:
        """Take the blocks before index `end` out of a slot's table; returns them."""
        dropped = self.block_table[slot, self.num_gone[slot] : end].copy()
        self.num_gone[slot] = end
        return dropped

    def blocks(self, slot: int) -> BlockIds:
        """The blocks that a slot holds, in the order of its table, as a view."""
        return self.block_table[slot, self.num_gone[slot] : self.end_block(slot)]

    def end_block(self, slot: int) -> int:
        """The index in its table at which a slot's next block goes."""
        return int(self.capacity[slot]) // self.block_size

    def first_tokens(self, slot: int) -> npt.NDArray[np.int32]:
        """What a slot's request knew when it came, or more, as a view; while it computes that, it
        draws nothing, and this is all."""
        return self._tokens[self._first_token[slot] : self._next_token[slot]]

    def tokens(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and output so far of a slot's request, as a view."""
        if self._log:
            self._write_log()
        return self.first_tokens(slot)
