"""PrefixCache: an exact index from token prefixes to the KV blocks that hold them.

A trie over whole blocks of tokens. Tokens are compared, not hashes of them, so nothing can collide.
A node's name is its block. The root's name is the tenant's salt, so that no tenant can find, or
probe by timing, what another has cached.

Blocks that came one after the other lie on one edge, up to EDGE of them: they are compared at once
and cost no look-up each. A branch may leave an edge at any node. Where it does, and where an edge
ends, one dictionary says how it goes on, keyed by (node, the tokens of the next block):

    root --[b0 .. b63]--> 63 --[b64 .. b70]--> 70        edges at (root, b0) and (63, b64)
                  \\__ from 9 --[c10 .. c20]--> 20'       and (9, c10)

Invariant: a cached block's parent is cached. Only leaves are evicted, least recently used first,
and one queue gives both: who references a cached block references its whole chain, and gives it
back from its end. So a parent comes to rest after its children, and the oldest idle block is a
leaf: the last of its edge. It also means that nothing is left that names an evicted parent: names
can be used again.

A node may have one tail: a block that is filled in part only. It can't be shared, for whoever goes
on would write it. It can be copied: who comes with the same tokens goes on in a block of its own.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millrace.scheduler.idle_blocks import BlockIds, IdleBlocks

Node = int | str  # a cached block, or the salt of a root
NO_SALT = ""
NO_BLOCKS: BlockIds = np.empty(0, np.int32)
EDGE = 64  # blocks; longer edges would be copied too often while they grow


@dataclass(slots=True)
class Chain:
    """How far a request's block table is indexed. Its blocks, being referenced, stay so."""

    salt: str = NO_SALT
    num_blocks: int = 0  # of its table, from the first; they are the chain from the root
    is_closed: bool = False  # another's block holds the tokens that come next: ours stay private


@dataclass(eq=False, slots=True)
class Edge:
    """Blocks in a row, and their tokens; of these the last ones may belong to blocks evicted."""

    key: tuple[Node, bytes]
    tokens: bytes
    blocks: array[int]


class PrefixCache:
    """Full blocks by content. Knows no reference counts: the pool says when a block rests."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.longest_edge = EDGE
        self._block_bytes = block_size * 4
        self._edges: dict[tuple[Node, bytes], Edge] = {}
        self._tails: dict[Node, int] = {}
        self._tail_key: dict[int, tuple[Node, bytes]] = {}  # by block, of tails
        self._edge = np.full(num_blocks, None, np.object_)  # by block
        self._is_cached = np.zeros(num_blocks, np.bool_)
        self._idle = IdleBlocks(num_blocks)

    def __len__(self) -> int:
        """Cached blocks, idle or referenced."""
        return int(np.count_nonzero(self._is_cached))

    @property
    def num_idle(self) -> int:
        """Cached blocks that no request references. All of them can be evicted."""
        return len(self._idle)

    def match(self, tokens: npt.NDArray[np.int32], salt: str = NO_SALT) -> BlockIds:
        """Blocks of the longest cached prefix of `tokens`, whole blocks only."""
        data, blocks, size = tokens.tobytes(), array("i"), self._block_bytes
        node: Node = salt
        start = 0
        while (edge := self._edges.get((node, data[start : start + size]))) is not None:
            on_edge = self._tokens_of(edge)
            if data.startswith(on_edge, start):
                blocks += edge.blocks
                start += len(on_edge)
            else:  # at least its first block is ours: a branch may leave it behind the last
                count = _num_common(data[start : start + len(on_edge)], on_edge) * 4 // size
                blocks += edge.blocks[:count]
                start += count * size
            node = blocks[-1]
        return np.frombuffer(blocks, np.int32) if blocks else NO_BLOCKS

    def insert(self, tokens: npt.NDArray[np.int32], table: BlockIds, chain: Chain) -> None:
        """Go on indexing a request's table under its tokens; the caller references all its blocks.

        Where another block holds equal content already, that one stays, and ours and all after it
        remain private: whoever references a cached block then references its whole chain.
        """
        size = self._block_bytes
        first, last = chain.num_blocks, min(len(table), tokens.nbytes // size)
        if chain.is_closed or first >= last:
            return
        data = tokens[first * size // 4 : last * size // 4].tobytes()
        node: Node = int(table[first - 1]) if first else chain.salt
        if self._next(node, data[:size]) is not None:
            chain.is_closed = True
            return
        # From here on all nodes are new: nobody has put anything behind them yet.
        fresh = table[first:last]
        self._is_cached.put(fresh, True)
        chain.num_blocks = last
        done = self._extend(node, data, fresh)
        while done < len(fresh):
            node = int(fresh[done - 1]) if done else node
            end = min(done + self.longest_edge, len(fresh))
            key = (node, data[done * size : (done + 1) * size])
            edge = Edge(key, data[done * size : end * size], array("i", fresh[done:end].tobytes()))
            self._edges[key] = edge
            self._edge[fresh[done:end]] = edge
            done = end

    def _extend(self, node: Node, data: bytes, blocks: BlockIds) -> int:
        """Put blocks at the end of the edge that ends in a node; returns how many have room."""
        edge: Edge | None = self._edge[node] if isinstance(node, int) else None
        if edge is None or edge.blocks[-1] != node:
            return 0
        count = min(self.longest_edge - len(edge.blocks), len(blocks))
        edge.tokens = self._tokens_of(edge) + data[: count * self._block_bytes]
        edge.blocks.frombytes(blocks[:count].tobytes())
        self._edge[blocks[:count]] = edge
        return count

    def _next(self, node: Node, tokens: bytes) -> int | None:
        """The full block that goes on behind a node with these tokens."""
        size = self._block_bytes
        edge: Edge | None = self._edge[node] if isinstance(node, int) else None
        if edge is not None:
            place = edge.blocks.index(int(node)) + 1
            on_edge = edge.tokens[place * size : (place + 1) * size]
            if place < len(edge.blocks) and on_edge == tokens:
                return edge.blocks[place]
        edge = self._edges.get((node, tokens))
        return None if edge is None else edge.blocks[0]

    def _tokens_of(self, edge: Edge) -> bytes:
        """Of its blocks; those of evicted ones are cut off first."""
        length = len(edge.blocks) * self._block_bytes
        if len(edge.tokens) > length:
            edge.tokens = edge.tokens[:length]
        return edge.tokens

    def partial(
        self, tokens: npt.NDArray[np.int32], blocks: BlockIds, salt: str = NO_SALT
    ) -> tuple[int, int] | None:
        """A block to copy behind `blocks`, which `match` found for `tokens` but for the last one.

        Returns it with the number of its tokens that are ours, at least one token less than we
        have. That is the tail there, or a full block if that would end our tokens.
        """
        size = self._block_bytes // 4
        start = len(blocks) * size
        node: Node = int(blocks[-1]) if len(blocks) else salt
        ours = tokens[start : start + size].tobytes()
        if len(tokens) == start + size:
            full = self._next(node, ours)
            if full is not None:
                return full, size - 1
        tail = self._tails.get(node)
        if tail is None:
            return None
        in_common = _num_common(ours, self._tail_key[tail][1])
        return tail, min(in_common, len(tokens) - start - 1)

    def keep_tail(self, tokens: bytes, block: int, parent: Node) -> int | None:
        """Index a referenced block that begins with `tokens`, less than a block of them.

        The newest tail stays, unless there is one that holds more of the same. Returns the block
        that had been the tail, which nobody references.
        """
        old = self._tails.get(parent)
        if old is not None:
            if self._tail_key[old][1].startswith(tokens):
                return None
            self._forget(old)
            self._idle.remove(old)
        self._tails[parent] = block
        self._tail_key[block] = (parent, tokens)
        self._is_cached[block] = True
        return old

    def rest(self, blocks: BlockIds) -> BlockIds:
        """The last reference to these is gone, in this order. Returns those that aren't cached."""
        is_cached = self._is_cached[blocks]
        self._idle.add(blocks[is_cached])
        return blocks[~is_cached]

    def wake(self, blocks: BlockIds) -> None:
        """These idle cached blocks are referenced again."""
        self._idle.remove(blocks)

    def evict(self, count: int) -> BlockIds:
        """Forget the `count` least recently used of the idle blocks; returns them."""
        evicted = self._idle.pop_oldest(count)
        for block in evicted.tolist():
            self._forget(block)
        return evicted

    def _forget(self, block: int) -> None:
        """Take a cached block, which is no other's parent, out of the index."""
        self._is_cached[block] = False
        if block in self._tail_key:
            del self._tails[self._tail_key.pop(block)[0]]
            return
        edge: Edge = self._edge[block]
        last = edge.blocks.pop()
        assert last == block, "a block is evicted after those behind it"
        if not edge.blocks:
            del self._edges[edge.key]
        self._edge[block] = None


def _num_common(ours: bytes, theirs: bytes) -> int:
    """How many int32 tokens two strings of them begin alike with."""
    length = min(len(ours), len(theirs)) // 4
    differ = np.frombuffer(ours, np.int32, length) != np.frombuffer(theirs, np.int32, length)
    return int(differ.argmax()) if differ.any() else length
