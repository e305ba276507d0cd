"""BlockPool: which KV block belongs to whom. Ids only; the tensors live with the runner.

A block is in exactly one of three states:

    free        on the free list, contents worthless
    referenced  in the block tables of `refs[block]` >= 1 requests; written while refs == 1 only
    cached      refs == 0, but the prefix cache knows its contents; taken when no free block is left

Every operation is O(1) a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from millrace.scheduler.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` blocks, with reference counts and the prefix cache's claims on idle ones."""

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cache = cache

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free, or cached and idle."""
        return len(self._free) + self._cache.num_idle

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.num_available

    def take(self) -> int | None:
        """A block for one owner to write, or None when every block is referenced."""
        if self._free:
            block = self._free.pop()
        else:
            evicted = self._cache.evict()
            if evicted is None:
                return None
            block = evicted
        self.refs[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each of these cached blocks."""
        for block in blocks:
            if self.refs[block] == 0:
                self._cache.wake(block)
            self.refs[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One owner less. Last block first: the cache evicts in this order, leaves first."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0 and not self._cache.rest(block):
                self._free.append(block)

    def flush(self) -> int:
        """Forget every idle cached block; returns how many."""
        forgotten = 0
        while (block := self._cache.evict()) is not None:
            self._free.append(block)
            forgotten += 1
        return forgotten
