"""BlockTables: which blocks a running request holds, from its first to its last.

    begins with      cached blocks of its prefix, then free ones for the rest of what it knows;
                     into the first of these a partly filled block is copied, if there is one
    grows by         a block whenever it decodes past the last one (scheduler.py asks the pool)
    gives up         blocks behind the window, where the model has one (window.py)
    leaves behind    what is computed, to the prefix cache; all its references, to the pool;
                     if it yields, maybe a copy on the host (swap.py)

It plans nothing: scheduler.py asks, and says which steps have been applied.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.idle_blocks import BlockIds
from millrace.scheduler.limits import Limits
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.prefix_cache import NO_BLOCKS, Chain, Node, PrefixCache
from millrace.scheduler.request import Request
from millrace.scheduler.slots import SlotTable
from millrace.scheduler.swap import HostPool, num_shared
from millrace.scheduler.window import blocks_for


class BlockTables:
    """Fills and empties the rows of a SlotTable, from one pool and one prefix cache."""

    def __init__(
        self,
        limits: Limits,
        slots: SlotTable,
        pool: BlockPool,
        cache: PrefixCache,
        cost: CostModel | None,
    ) -> None:
        self._slots, self._pool, self._cache = slots, pool, cache
        self.host = HostPool(limits.host_blocks, limits.block_copy_s, cost)
        self._caches = limits.prefix_caching
        self._size = limits.block_size
        self.window = limits.sliding
        # Tokens from the first on that the prefix cache may know of one request.
        held = limits.num_blocks if self.window is None else self.window.indexed
        self._indexed_tokens = held * limits.block_size
        # A copy is a launch more; computing a few tokens more beside others is next to nothing.
        self._least_copied = max(1, limits.block_size // 4)
        self._written = np.zeros(limits.num_blocks, np.int64)
        """newest step that fills a block, but by decoding"""
        self._indices = np.arange(limits.num_blocks)  # of blocks in a table

    def place(self, plan: StepPlan, request: Request, leader: Request | None) -> bool:
        """A slot, and blocks to compute what it knows; False, and nothing is taken: too few.

        `leader` runs, and may have computed the same beginning in a block of its own.
        """
        hits = self._cached_prefix(request)
        if not self._is_room(request, hits):
            return False
        copy = self._to_copy(plan.step, request, hits, leader)
        self._pool.share(hits)  # before taking others, which may evict
        fresh = self._pool.take(self.to_begin(request.num_known) - len(hits))
        assert fresh is not None, "blocks were counted before they were taken"
        self._written.put(fresh, plan.step)
        blocks = np.concatenate([hits, fresh]) if len(hits) else fresh
        request.num_computed = self.host.swap_in(plan, request, len(hits), blocks)
        if request.num_computed == 0:
            request.num_computed = len(hits) * self._size
            if copy is not None:  # even of a block just evicted: nothing has been written yet
                plan.block_copies.append((copy[0], int(fresh[0])))
                request.num_computed += copy[1]
        chain = Chain(request.tenant, len(hits), is_closed=not self._caches)
        slot = self._slots.occupy(request, blocks, request.num_computed, chain)
        plan.append_blocks(slot, self._indices[: len(blocks)], blocks)
        return True

    def fits(self, request: Request) -> bool:
        """Whether `place` would find blocks for it."""
        return self._is_room(request, self._cached_prefix(request))

    def to_begin(self, num_known: int) -> int:
        """Blocks that a request needs to compute so many tokens."""
        all_of_them = blocks_for(num_known, self._size)
        return all_of_them if self.window is None else min(all_of_them, self.window.reserved)

    def wrote(self, step: int, request: Request, start: int) -> None:
        """A step computes a request's positions from `start` to `num_computed`: index them."""
        end = blocks_for(request.num_computed, self._size)
        blocks = self._slots.block_table[request.slot, start // self._size : end]
        self._written.put(blocks, step)
        self._index(request, self._slots.first_tokens(request.slot))

    def _index(self, request: Request, tokens: npt.NDArray[np.int32]) -> None:
        """Put its full blocks into the prefix cache whose tokens are both known and computed."""
        slot, table = request.slot, self._slots
        valid = tokens[: min(int(table.computed[slot]), self._indexed_tokens)]
        self._cache.insert(valid, table.blocks(slot), table.chains[slot])

    def leave(self, request: Request) -> None:
        """Its last step is applied: what it has computed stays in the prefix cache."""
        slot, table = request.slot, self._slots
        valid, chain = table.tokens(slot)[: table.computed[slot]], table.chains[slot]
        self._index(request, valid)
        num_full, num_left = divmod(len(valid), self._size)
        is_whole = chain.num_blocks == num_full and not chain.is_closed
        if is_whole and num_left >= self._least_copied:
            blocks, tokens = table.blocks(slot), valid[num_full * self._size :].tobytes()
            parent: Node = int(blocks[num_full - 1]) if num_full else request.tenant
            self._pool.keep_tail(tokens, int(blocks[num_full]), parent)

    def swap_out(self, request: Request) -> None:
        """It has yielded: keep its KV on the host, if that is cheaper than computing it again."""
        if self.host.num_blocks and self.window is None:
            num_tokens = int(self._slots.computed[request.slot])
            computed = self._slots.blocks(request.slot)[: blocks_for(num_tokens, self._size)]
            first = num_shared(self._pool.refs[computed])
            self.host.swap_out(request, computed, first, num_tokens)

    def give_back(self, request: Request) -> None:
        """All that it holds; the slot is left to the scheduler."""
        self._pool.give_back(self._slots.blocks(request.slot))

    # ------------------------------------------------------------ windows

    def room_ahead(self, plan: StepPlan, request: Request, applied: int) -> int:
        """Positions of a prompt that there are blocks for, the next one first.

        What is reserved at admission suffices to the end: what falls behind the window comes again.
        """
        slot, table = request.slot, self._slots
        if self.window is not None:
            self.slide(request, request.num_computed, applied)
            missing = blocks_for(request.num_known, self._size) - table.end_block(slot)
            unused = self.window.reserved - len(table.blocks(slot))
            fresh = self._pool.take(max(0, min(missing, unused, self._pool.num_available)))
            assert fresh is not None, "no more than there are"
            plan.append_blocks(slot, table.extend(slot, fresh), fresh)
        return int(table.capacity[slot]) - request.num_computed

    def slide(self, request: Request, position: int, applied: int) -> None:
        """Give back what nothing reads that computes from `position` on, nor its chunks in flight.

        Only a whole chain leaves the prefix cache's care: see window.py.
        """
        assert self.window is not None, "only a window slides"
        launched, slot = request.launched, request.slot
        while launched and launched[0][0] <= applied:
            launched.popleft()
        end = self.window.first_needed(launched[0][1] if launched else position)
        chain = self._slots.chains[slot]
        if end > self._slots.num_gone[slot] and end >= chain.num_blocks:
            self._pool.give_back(self._slots.drop_blocks(slot, end))
            self._slots.chains[slot] = Chain(chain.salt, is_closed=True)

    def _is_room(self, request: Request, hits: BlockIds) -> bool:
        need = self.to_begin(request.num_known) - len(hits)
        return self._pool.num_available - self._pool.num_idle(hits) >= need

    def _to_copy(
        self, step: int, request: Request, hits: BlockIds, leader: Request | None
    ) -> tuple[int, int] | None:
        """The block to copy behind `hits`, and the tokens that saves; None if that is too few.

        Its tokens must have been computed in an earlier step: copies come first in a step.
        """
        if not (self._caches and request.read_cache):
            return None
        known = request.known_tokens()
        found = [self._cache.partial(known, hits, request.tenant)]
        if leader is not None and leader.tenant == request.tenant:
            found.append(self._in_leader(known, hits, leader))
        usable = [pair for pair in found if pair is not None and self._written[pair[0]] < step]
        source, saved = max(usable, key=lambda pair: pair[1], default=(0, 0))
        return (source, saved) if saved >= self._least_copied else None

    def _in_leader(
        self, known: npt.NDArray[np.int32], hits: BlockIds, leader: Request
    ) -> tuple[int, int] | None:
        """Of a leader that holds `hits` too: its next block, and the tokens that begin it alike."""
        theirs, count = self._slots.blocks(leader.slot), len(hits)
        is_whole = self._slots.num_gone[leader.slot] == 0
        if not is_whole or len(theirs) <= count or not np.array_equal(theirs[:count], hits):
            return None
        start = count * self._size
        end = min(len(known) - 1, leader.num_computed, len(leader.prompt), start + self._size)
        differ = known[start:end] != leader.prompt[start:end]
        return int(theirs[count]), int(differ.argmax()) if differ.any() else len(differ)

    def _cached_prefix(self, request: Request) -> BlockIds:
        """Cached blocks to begin with; at least one token is left to compute."""
        if not (self._caches and request.read_cache):
            return NO_BLOCKS
        tokens = request.known_tokens()[: min(request.num_known - 1, self._indexed_tokens)]
        return self._cache.match(tokens, request.tenant)
