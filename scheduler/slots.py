"""SlotTable: all that a step must know of the running requests, in arrays indexed by slot.

The host's counterpart of the table on the device. A step is a few operations on whole arrays, and
costs the same whether a request is old or new, long or short. Python visits a request when it comes
and when it goes.

S slots, C tokens of the longest sequence, M blocks of one. Untouched rows take no memory: the
operating system gives a page when it is first written.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millrace.scheduler.prefix_cache import BlockIds, Chain
from millrace.scheduler.request import NEVER, NO_SLOT, Request

Slots = npt.NDArray[np.intp]


class SlotTable:
    """Who owns which slot, and how far it is. Changed by the scheduler alone."""

    def __init__(self, num_slots: int, max_context: int, block_size: int) -> None:
        max_blocks = -(-max_context // block_size)
        self.block_size = block_size
        self.max_context = max_context
        self.requests: list[Request | None] = [None] * num_slots
        self.chains: list[Chain] = [Chain()] * num_slots  # what of its table is in the prefix cache
        self.free = list(range(num_slots - 1, -1, -1))
        self.ids = np.zeros(num_slots, np.int64)  # of the requests
        self.is_live = np.zeros(num_slots, np.bool_)  # owned by a request that has not ended
        self.decodes = np.zeros(num_slots, np.bool_)
        self.computed = np.zeros(num_slots, np.int32)  # tokens whose KV is, or is being computed
        self.end = np.zeros(num_slots, np.int32)  # `computed` once the last token is drawn
        self.capacity = np.zeros(num_slots, np.int32)  # tokens that its blocks have room for
        self.first_block = np.zeros(num_slots, np.int32)  # of its table; those before are gone
        self.last_step = np.full(num_slots, NEVER, np.int64)  # newest launched step
        self.block_table = np.zeros((num_slots, max_blocks), np.int32)  # [S, M]
        self._tokens = np.zeros(num_slots * max_context, np.int32)  # [S * C]
        # Into _tokens: where a slot's tokens begin, where the next one goes, where none goes more.
        self._first_token = np.arange(num_slots) * max_context
        self._next_token = self._first_token.copy()
        self._last_token = self._first_token.copy()

    def occupy(self, request: Request, blocks: BlockIds, num_computed: int, chain: Chain) -> int:
        """Give a request a slot of its own; returns it."""
        slot = self.free.pop()
        known = request.known_tokens()
        request.slot = slot
        self.requests[slot], self.chains[slot] = request, chain
        self.ids[slot] = request.id
        self.is_live[slot] = True
        self.computed[slot] = num_computed
        self.end[slot] = request.max_length - 1  # the last token's KV is never computed
        self.capacity[slot] = len(blocks) * self.block_size
        self.first_block[slot] = 0
        self.block_table[slot, : len(blocks)] = blocks
        first = self._first_token[slot]
        self._next_token[slot] = first + len(known)
        self._last_token[slot] = first + request.max_length
        self._tokens[first : first + len(known)] = known
        return slot

    def vacate(self, slot: int) -> None:
        """Its request has been released."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is free already"
        request.slot = NO_SLOT
        self.requests[slot] = None
        self.is_live[slot] = self.decodes[slot] = False
        self.free.append(slot)

    def append(self, slots: Slots, token_ids: npt.NDArray[np.int64]) -> None:
        """One more token each, all slots different."""
        address = self._next_token[slots]
        self._tokens.put(address, token_ids)
        address += 1
        self._next_token[slots] = address

    def at_length(self) -> Slots:
        """Live slots whose requests have drawn all their tokens."""
        slots: Slots = ((self._next_token == self._last_token) & self.is_live).nonzero()[0]
        return slots

    def add_blocks(self, slots: Slots, blocks: BlockIds) -> list[tuple[int, int, int]]:
        """One more block each, all slots different; returns (slot, index in its table, block)."""
        index = self.capacity[slots] // self.block_size
        self.block_table[slots, index] = blocks
        self.capacity[slots] += self.block_size
        return list(zip(slots.tolist(), index.tolist(), blocks.tolist(), strict=True))

    def extend(self, slot: int, blocks: BlockIds) -> list[tuple[int, int, int]]:
        """More blocks for one slot; returns what `add_blocks` does."""
        first = self.end_block(slot)
        self.block_table[slot, first : first + len(blocks)] = blocks
        self.capacity[slot] += len(blocks) * self.block_size
        return [(slot, first + i, block) for i, block in enumerate(blocks.tolist())]

    def drop_blocks(self, slot: int, end: int) -> BlockIds:
        """Take the blocks before index `end` out of a slot's table; returns them."""
        dropped = self.block_table[slot, self.first_block[slot] : end].copy()
        self.first_block[slot] = end
        return dropped

    def blocks(self, slot: int) -> BlockIds:
        """The blocks that a slot holds, as a view: its table from `first_block` on."""
        return self.block_table[slot, self.first_block[slot] : self.end_block(slot)]

    def end_block(self, slot: int) -> int:
        """The index in its table at which a slot's next block goes."""
        return int(self.capacity[slot]) // self.block_size

    def tokens(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and output so far of a slot's request, as a view."""
        return self._tokens[self._first_token[slot] : self._next_token[slot]]
