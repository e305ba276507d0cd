"""IdleBlocks: the cached blocks that nobody references, least recently used first.

A request brings dozens of blocks to rest at once, and the next turn of a chat wakes as many. So
they are queued in the arrays in which they came, and waking does not touch the queue: it strikes
out when they came to rest, and whoever takes from the queue passes over what is struck out.

    queue      (1, [7 4 2])  (2, [5 9])  (3, [4 6])      4 was woken, and has come to rest again
    since      7: 1   2: 1   5: 2   9: 2   4: 3   6: 3   others: 0
    in order   7 2 5 9 4 6
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]
MOST_STRUCK_OUT = 2  # times the number of blocks: then the queue is written anew


class IdleBlocks:
    """An ordered set of block ids."""

    def __init__(self, num_blocks: int) -> None:
        self._since = np.zeros(num_blocks, np.int64)  # by block; 0: it does not rest
        self._queue: deque[tuple[int, BlockIds]] = deque()
        self._num_queued = 0  # struck out or not
        self._now = 0
        self._num_idle = 0

    def __len__(self) -> int:
        return self._num_idle

    def __iter__(self) -> Iterator[int]:
        """The blocks, in their order."""
        return (block for arrived in self._queue for block in self._still_idle(*arrived).tolist())

    def add(self, blocks: BlockIds) -> None:
        """These are the last to come to rest, in this order. The array stays as it is from here."""
        self._now += 1
        self._since.put(blocks, self._now)
        self._queue.append((self._now, blocks))
        self._num_idle += len(blocks)
        self._num_queued += len(blocks)
        if self._num_queued > MOST_STRUCK_OUT * len(self._since):
            self._rewrite()

    def remove(self, blocks: BlockIds | int) -> None:
        """These rest no more."""
        self._since[blocks] = 0
        self._num_idle -= np.size(blocks)

    def pop_oldest(self, count: int) -> BlockIds:
        """Take out the first `count`, no more than there are."""
        taken: list[BlockIds] = []
        missing = count
        while missing:
            since, queued = self._queue.popleft()
            idle = self._still_idle(since, queued)
            taken.append(idle[:missing])
            self._num_queued -= len(queued)
            if len(idle) > missing:
                self._queue.appendleft((since, idle[missing:]))
                self._num_queued += len(idle) - missing
            missing -= len(taken[-1])
        popped = np.concatenate(taken) if taken else np.empty(0, np.int32)
        self.remove(popped)
        return popped

    def _still_idle(self, since: int, blocks: BlockIds) -> BlockIds:
        still: BlockIds = blocks[self._since[blocks] == since]
        return still

    def _rewrite(self) -> None:
        """Leave out what is struck out: its cost was paid by those that were queued."""
        still = [(since, self._still_idle(since, blocks)) for since, blocks in self._queue]
        self._queue = deque(arrived for arrived in still if len(arrived[1]))
        self._num_queued = self._num_idle
