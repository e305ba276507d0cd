"""BlockPool: which KV block belongs to whom. Ids only; the tensors live with the runner.

A block is in exactly one of three states:

    free        on the free list, contents worthless
    referenced  in the block tables of `refs[block]` >= 1 requests; written while refs == 1 only
    cached      refs == 0, but the prefix cache knows its contents; taken when no free block is left

Blocks come and go in arrays, so that what many requests do in one step costs one call.
"""

from __future__ import annotations

import numpy as np

from millrace.scheduler.idle_blocks import BlockIds
from millrace.scheduler.prefix_cache import Node, PrefixCache


class BlockPool:
    """`num_blocks` blocks, with reference counts and the prefix cache's claims on idle ones."""

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.refs = np.zeros(num_blocks, np.int32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: [:_num_free]
        self._num_free = num_blocks
        self.num_evicted = 0  # cached blocks that were taken for their room, since the start
        self._cache = cache

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free, or cached and idle."""
        return self._num_free + self._cache.num_idle

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.num_available

    def take(self, count: int) -> BlockIds | None:
        """Blocks for one owner each to write; None, and nothing is taken, if there are fewer."""
        num_evicted = max(0, count - self._num_free)
        if num_evicted > self._cache.num_idle:
            return None
        end, self._num_free = self._num_free, self._num_free - count + num_evicted
        blocks = self._free[self._num_free : end].copy()
        if num_evicted:
            self.num_evicted += num_evicted
            blocks = np.concatenate([blocks, self._cache.evict(num_evicted)])
        self.refs.put(blocks, 1)  # half the time of an assignment
        return blocks

    def num_idle(self, blocks: BlockIds) -> int:
        """How many of these cached blocks nobody references, so that sharing them takes them."""
        return len(blocks) - int(np.count_nonzero(self.refs[blocks])) if len(blocks) else 0

    def share(self, blocks: BlockIds) -> None:
        """One more owner for each of these cached blocks."""
        if len(blocks):
            self._cache.wake(blocks[self.refs[blocks] == 0])
            self.refs[blocks] += 1

    def give_back(self, blocks: BlockIds) -> None:
        """One owner less. Last block first: the cache evicts in this order, leaves first."""
        left = self.refs[blocks] - 1
        self.refs[blocks] = left
        self._put(self._cache.rest(blocks[left == 0][::-1]))

    def keep_tail(self, tokens: bytes, block: int, parent: Node) -> None:
        """The prefix cache shall know a partly filled block that is about to be given back."""
        displaced = self._cache.keep_tail(tokens, block, parent)
        if displaced is not None:
            self._put(np.array([displaced], np.int32))

    def flush(self) -> int:
        """Forget every idle cached block; returns how many."""
        forgotten = self._cache.evict(self._cache.num_idle)
        self._put(forgotten)
        return len(forgotten)

    def _put(self, blocks: BlockIds) -> None:
        end = self._num_free + len(blocks)
        self._free[self._num_free : end] = blocks
        self._num_free = end
