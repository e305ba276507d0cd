"""PrefixCache: an exact index from token prefixes to the KV blocks that hold them.

A trie whose edges are whole blocks of tokens. It is one dictionary keyed by (parent, the block's
int32 bytes): equality is on the tokens themselves, so nothing can collide, and a look-up ends at
the first miss. A node's name is its block. The root's name is the tenant's salt, so that no tenant
can find, or probe by timing, what another has cached.

Invariant: a cached block's parent is cached. Only leaves are evicted, least recently used first,
and one queue gives both: who references a cached block references its whole chain, and gives it
back from its end. So a parent comes to rest after its children, and the oldest idle block is a
leaf. It also means that no key is left that names an evicted parent: names can be used again.

Long prompts leap: from a node whose depth is a multiple of LEAP there may be one edge over LEAP
blocks at once, which needs no hashing, only a comparison. It goes with the block that it leads to.

    root --b0--> 0 --b1--> 1 ... --b7--> 7 --b8--> 8
      \\______________ b0..b7 __________/^

A node may have one tail: a block that is filled in part only. It can't be shared, for whoever goes
on would write it. It can be copied: who comes with the same tokens goes on in a block of its own.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]
Node = int | str  # a cached block, or the salt of a root
NO_SALT = ""
LEAP = 8  # blocks


@dataclass(slots=True)
class Chain:
    """How far a request's block table is indexed. Its blocks, being referenced, stay so."""

    salt: str = NO_SALT
    num_blocks: int = 0  # of its table, from the first; they are the chain from the root
    is_closed: bool = False  # another's block holds the tokens that come next: ours stay private


class PrefixCache:
    """Full blocks by content. Knows no reference counts: the pool says when a block rests."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._block_bytes = block_size * 4
        self._child: dict[tuple[Node, bytes], int] = {}
        self._leaps: dict[Node, tuple[bytes, array[int]]] = {}  # the tokens and the blocks between
        self._tails: dict[Node, int] = {}  # in no other block's chain
        # By block: the key that leads to it, and where a leap to it begins.
        self._key: list[tuple[Node, bytes] | None] = [None] * num_blocks
        self._leap_from: list[Node | None] = [None] * num_blocks
        self._is_cached = np.zeros(num_blocks, np.bool_)
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks nobody references, oldest first

    def __len__(self) -> int:
        """Cached blocks, idle or referenced."""
        return len(self._child) + len(self._tails)

    @property
    def num_idle(self) -> int:
        """Cached blocks that no request references. All of them can be evicted."""
        return len(self._idle)

    def match(self, tokens: npt.NDArray[np.int32], salt: str = NO_SALT) -> BlockIds:
        """Blocks of the longest cached prefix of `tokens`, whole blocks only."""
        data, blocks = tokens.tobytes(), array("i")
        child, leaps, size = self._child, self._leaps, self._block_bytes
        node: Node = salt
        start = 0
        while True:
            leap = leaps.get(node)
            if leap is not None and data.startswith(leap[0], start):
                blocks += leap[1]
                start += len(leap[0])
            else:
                found = child.get((node, data[start : start + size]))
                if found is None:
                    return np.array(blocks, np.int32)
                blocks.append(found)
                start += size
            node = blocks[-1]

    def insert(self, tokens: npt.NDArray[np.int32], table: BlockIds, chain: Chain) -> None:
        """Go on indexing a request's table under its tokens; the caller references all its blocks.

        Where another block holds equal content already, that one stays, and ours and all after it
        remain private: whoever references a cached block then references its whole chain.
        """
        first, last = chain.num_blocks, min(len(table), tokens.nbytes // self._block_bytes)
        if chain.is_closed or first >= last:
            return
        size, data = self._block_bytes, tokens.tobytes()
        child, keys = self._child, self._key
        node: Node = int(table[first - 1]) if first else chain.salt
        for index, block in enumerate(table[first:last].tolist(), start=first):
            key = (node, data[index * size : (index + 1) * size])
            if child.setdefault(key, block) != block:
                chain.is_closed = True
                last = index
                break
            keys[block] = key
            node = block
        chain.num_blocks = last
        self._is_cached[table[first:last]] = True
        for end in range((first // LEAP + 1) * LEAP, last + 1, LEAP):
            self._add_leap(data[(end - LEAP) * size : end * size], table[:end], chain.salt)

    def partial(
        self, tokens: npt.NDArray[np.int32], blocks: BlockIds, salt: str = NO_SALT
    ) -> tuple[int, int] | None:
        """A block to copy behind `blocks`, which `match` found for `tokens` but for the last one.

        Returns it with the number of its tokens that are ours, at least one token less than we
        have. That is the tail there, or a full block if that would end our tokens.
        """
        start, size = len(blocks) * self._block_bytes, self._block_bytes
        node: Node = int(blocks[-1]) if len(blocks) else salt
        ours = tokens.tobytes()[start : start + size]
        if len(ours) == size and tokens.nbytes == start + size:
            full = self._child.get((node, ours))
            if full is not None:
                return full, size // 4 - 1
        tail = self._tails.get(node)
        key = None if tail is None else self._key[tail]
        if tail is None or key is None:
            return None
        return tail, min(_num_common(ours, key[1]), tokens.size - start // 4 - 1)

    def keep_tail(self, tokens: bytes, block: int, parent: Node) -> int | None:
        """Index a referenced block that begins with `tokens`, less than a block of them.

        The newest tail stays, unless there is one that holds more of the same. Returns the block
        that had been the tail, which nobody references.
        """
        old = self._tails.get(parent)
        if old is not None:
            key = self._key[old]
            assert key is not None, "a tail has a key"
            if key[1].startswith(tokens):
                return None
            self._forget(old)
            del self._idle[old]
        self._tails[parent] = block
        self._key[block] = (parent, tokens)
        self._is_cached[block] = True
        return old

    def rest(self, blocks: BlockIds) -> BlockIds:
        """The last reference to these is gone, in this order. Returns those that aren't cached."""
        is_cached = self._is_cached[blocks]
        self._idle.update(dict.fromkeys(blocks[is_cached].tolist()))
        return blocks[~is_cached]

    def wake(self, blocks: BlockIds) -> None:
        """These idle cached blocks are referenced again."""
        for block in blocks.tolist():
            del self._idle[block]

    def evict(self, count: int) -> BlockIds:
        """Forget the `count` least recently used of the idle blocks; returns them."""
        evicted = np.empty(count, np.int32)
        for index in range(count):
            evicted[index], _ = self._idle.popitem(last=False)
            self._forget(int(evicted[index]))
        return evicted

    def _forget(self, block: int) -> None:
        """Take a cached block, which is no other's parent, out of the index."""
        key, leap_from = self._key[block], self._leap_from[block]
        assert key is not None, "an idle block is cached"
        if len(key[1]) < self._block_bytes:
            del self._tails[key[0]]
        else:
            del self._child[key]
        if leap_from is not None:
            del self._leaps[leap_from]
        self._key[block] = self._leap_from[block] = None
        self._is_cached[block] = False

    def _add_leap(self, tokens: bytes, table: BlockIds, salt: str) -> None:
        """Over the last LEAP blocks of `table`, unless there is one from there already."""
        start: Node = int(table[-LEAP - 1]) if len(table) > LEAP else salt
        if start not in self._leaps:
            self._leaps[start] = (tokens, array("i", table[-LEAP:].tobytes()))
            self._leap_from[int(table[-1])] = start


def _num_common(ours: bytes, theirs: bytes) -> int:
    """How many int32 tokens two strings of them begin alike with."""
    length = min(len(ours), len(theirs)) // 4
    differ = np.frombuffer(ours, np.int32, length) != np.frombuffer(theirs, np.int32, length)
    return int(differ.argmax()) if differ.any() else length
