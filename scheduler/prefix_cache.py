"""PrefixCache: an exact index from token prefixes to the KV blocks that hold them.

A trie whose edges are whole blocks of tokens. It is one dictionary keyed by (parent node, the
block's int32 bytes): equality is on the tokens themselves, so nothing can collide, and a look-up
ends at the first miss. Node ids come from a counter and are never used twice.

Invariant: a cached node's parent is cached. Only leaves are evicted, least recently used first, and
one queue gives both: who references a cached block references its whole chain, and gives it back
from its end. So a parent comes to rest after its children, and the oldest idle node is a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROOT = 0


@dataclass(frozen=True, slots=True)
class _Node:
    parent: int
    key: bytes  # the block's tokens
    block: int


class PrefixCache:
    """Full blocks by content. Knows no reference counts: the pool says when a block rests."""

    def __init__(self, block_size: int) -> None:
        self._block_bytes = block_size * 4
        self._ids: dict[tuple[int, bytes], int] = {}
        self._nodes: dict[int, _Node] = {}
        self._node_of_block: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # nodes nobody references, oldest first
        self._next_id = ROOT + 1

    def __len__(self) -> int:
        """Cached blocks, idle or referenced."""
        return len(self._nodes)

    @property
    def num_idle(self) -> int:
        """Cached blocks that no request references. All of them can be evicted."""
        return len(self._idle)

    def match(self, tokens: npt.NDArray[np.int32]) -> list[int]:
        """Blocks of the longest cached prefix of `tokens`, whole blocks only."""
        data, node, blocks = tokens.tobytes(), ROOT, []
        for start in range(0, len(data) - self._block_bytes + 1, self._block_bytes):
            child = self._ids.get((node, data[start : start + self._block_bytes]))
            if child is None:
                break
            node = child
            blocks.append(self._nodes[node].block)
        return blocks

    def insert(self, tokens: npt.NDArray[np.int32], blocks: list[int]) -> None:
        """Index blocks[i] under the i-th full block of `tokens`; the caller references them all.

        Where another block holds equal content already, that one stays, and ours and all after it
        remain private: whoever references a cached block then references its whole chain.
        """
        data, node = tokens.tobytes(), ROOT
        for index in range(min(len(blocks), len(data) // self._block_bytes)):
            key = data[index * self._block_bytes : (index + 1) * self._block_bytes]
            child = self._ids.get((node, key))
            if child is None:
                child = self._add(node, key, blocks[index])
            elif self._nodes[child].block != blocks[index]:
                return
            node = child

    def rest(self, block: int) -> bool:
        """The last reference is gone. False: the block isn't cached and is free."""
        node_id = self._node_of_block.get(block)
        if node_id is None:
            return False
        self._idle[node_id] = None
        return True

    def wake(self, block: int) -> None:
        """An idle cached block is referenced again."""
        del self._idle[self._node_of_block[block]]

    def evict(self) -> int | None:
        """Forget the least recently used idle block; returns it, None if there is none."""
        if not self._idle:
            return None
        node_id, _ = self._idle.popitem(last=False)
        node = self._nodes.pop(node_id)
        del self._ids[node.parent, node.key]
        del self._node_of_block[node.block]
        return node.block

    def _add(self, parent: int, key: bytes, block: int) -> int:
        node_id = self._next_id
        self._next_id += 1
        self._ids[parent, key] = node_id
        self._nodes[node_id] = _Node(parent, key, block)
        self._node_of_block[block] = node_id
        return node_id
