"""Window: how many blocks a request needs of a model that forgets what lies far behind.

Where every layer has a sliding window of w tokens, position p reads positions p - w + 1 .. p alone.
Blocks behind that go back while the request runs, so a request may be longer than the pool.

    |  indexed beginning  |   given back    |<------ w ------>|  next chunk  |
    0                  indexed         first_needed        position

The beginning of a prompt stays in the prefix cache, as far as the first w tokens: a block in the
index is referenced with its whole chain, or not at all. So it goes back as a whole, and in order,
once the window has passed its end; from then on blocks go back one by one.
"""

from __future__ import annotations

from dataclasses import dataclass


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class Window:
    """In blocks of one pool. `make` says None where blocks never need to go back early."""

    tokens: int  # w
    block_size: int
    indexed: int  # blocks of a prompt that the prefix cache may know
    reserved: int  # blocks with which any prompt can be computed to its end

    @classmethod
    def make(
        cls, tokens: int | None, block_size: int, num_blocks: int, max_step_tokens: int
    ) -> Window | None:
        """None without a window, and where the pool is smaller than one.

        Two chunks' room beside the window, where there is so much: the next one can be planned
        while one is in flight. One block's is enough to go on.
        """
        if tokens is None:
            return None
        least = blocks_for(tokens - 1, block_size) + 1
        if num_blocks < least:
            return None
        indexed = min(blocks_for(tokens, block_size), num_blocks - least)
        wanted = indexed + blocks_for(tokens - 1 + 2 * max_step_tokens, block_size) + 1
        return cls(tokens, block_size, indexed, min(wanted, num_blocks))

    def first_needed(self, position: int) -> int:
        """The first block that computing this position, or a later one, reads."""
        return max(0, position - self.tokens + 1) // self.block_size
