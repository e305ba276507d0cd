"""PrefixCache: an exact index from token prefixes to the KV blocks that hold them.

A trie whose edges are whole blocks of tokens. It is one dictionary keyed by (parent node, the
block's int32 bytes): equality is on the tokens themselves, so nothing can collide, and a look-up
ends at the first miss. Node ids come from a counter and are never used twice.

Invariant: a cached node's parent is cached. Only leaves are evicted, least recently used first.
An idle node (refs 0) with children waits until they are gone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROOT = 0


@dataclass(slots=True)
class _Node:
    parent: int
    key: bytes  # the block's tokens
    block: int
    num_children: int = 0
    idle: bool = False  # no request references its block


class PrefixCache:
    """Full blocks by content. Knows no reference counts: the pool says when a block rests."""

    def __init__(self, block_size: int) -> None:
        self._block_bytes = block_size * 4
        self._ids: dict[tuple[int, bytes], int] = {}
        self._nodes: dict[int, _Node] = {}
        self._node_of_block: dict[int, int] = {}
        self._idle_leaves: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._next_id = ROOT + 1
        self.num_idle = 0

    def __len__(self) -> int:
        """Cached blocks, idle or referenced."""
        return len(self._nodes)

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
        """Index blocks[i] under the i-th full block of `tokens`.

        Where another block holds equal content already, that one stays, and ours and all after it
        remain private: whoever references a cached block then references its whole chain, so an
        idle block never has a referenced child and can always be had by evicting leaves.
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
        node = self._nodes[node_id]
        node.idle = True
        self.num_idle += 1
        if node.num_children == 0:
            self._idle_leaves[node_id] = None
        return True

    def wake(self, block: int) -> None:
        """An idle cached block is referenced again."""
        node_id = self._node_of_block[block]
        self._nodes[node_id].idle = False
        self.num_idle -= 1
        self._idle_leaves.pop(node_id, None)

    def evict(self) -> int | None:
        """Forget the least recently used idle leaf; returns its block, None if there is none."""
        if not self._idle_leaves:
            return None
        node_id, _ = self._idle_leaves.popitem(last=False)
        node = self._nodes.pop(node_id)
        del self._ids[node.parent, node.key]
        del self._node_of_block[node.block]
        self.num_idle -= 1
        self._drop_child(node.parent)
        return node.block

    def _add(self, parent: int, key: bytes, block: int) -> int:
        node_id = self._next_id
        self._next_id += 1
        self._ids[parent, key] = node_id
        self._nodes[node_id] = _Node(parent, key, block)
        self._node_of_block[block] = node_id
        if parent != ROOT:
            self._nodes[parent].num_children += 1
            self._idle_leaves.pop(parent, None)
        return node_id

    def _drop_child(self, parent: int) -> None:
        if parent == ROOT:
            return
        node = self._nodes[parent]
        node.num_children -= 1
        if node.num_children == 0 and node.idle:
            # It was last used no later than the child that has just been the oldest.
            self._idle_leaves[parent] = None
            self._idle_leaves.move_to_end(parent, last=False)
