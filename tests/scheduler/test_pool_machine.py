"""BlockPool and PrefixCache together against a model that remembers what each block holds."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import Chain, PrefixCache

BLOCK_SIZE = 2
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def as_array(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


class PoolMachine(RuleBasedStateMachine):
    """Requests take, share, remember and give back blocks in any order."""

    @initialize(num_blocks=st.integers(1, 8))
    def make(self, num_blocks):
        self.cache = PrefixCache(BLOCK_SIZE, num_blocks)
        self.pool = BlockPool(num_blocks, self.cache)
        self.tables: list[tuple[list[int], list[int], Chain]] = []  # tokens, blocks
        self.holds: dict[int, list[int]] = {}  # block -> tokens up to its end

    @rule(tokens=PROMPTS)
    def admit(self, tokens):
        hits = self.cache.match(as_array(tokens[:-1])).tolist()
        for index, block in enumerate(hits):
            assert self.holds[block] == tokens[: (index + 1) * BLOCK_SIZE]
        self.pool.share(as_array(hits))
        blocks = list(hits)
        while len(blocks) * BLOCK_SIZE < len(tokens):
            taken = self.pool.take(1)
            if taken is None:
                self.pool.give_back(as_array(blocks))
                return
            (block,) = taken.tolist()
            assert all(block not in table for _, table, _ in self.tables), "taken from its owner"
            assert block not in blocks, "taken twice"
            blocks.append(block)
            self.holds[block] = tokens[: len(blocks) * BLOCK_SIZE]
        self.tables.append((tokens, blocks, Chain(num_blocks=len(hits))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def remember(self, data):
        tokens, blocks, chain = data.draw(st.sampled_from(self.tables))
        self.cache.insert(as_array(tokens), as_array(blocks), chain)
        if len(tokens) >= BLOCK_SIZE:
            assert len(self.cache.match(as_array(tokens))), "nothing was remembered"

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.give_back(as_array(self.tables.pop(index)[1]))

    @rule()
    def flush(self):
        self.pool.flush()
        assert self.cache.num_idle == 0

    @rule()
    def take_all_there_is(self):
        """Every block that is called available can be had."""
        taken = self.pool.take(self.pool.num_available)
        assert taken is not None
        assert self.pool.take(1) is None
        self.pool.give_back(taken)

    @invariant()
    def references_are_the_tables(self):
        if not hasattr(self, "pool"):
            return
        held = [block for _, blocks, _ in self.tables for block in blocks]
        counts = [held.count(block) for block in range(self.pool.num_blocks)]
        assert self.pool.refs.tolist() == counts
        assert self.pool.num_referenced == len(set(held))

    @invariant()
    def what_is_matched_is_what_was_written(self):
        for tokens, _, _ in getattr(self, "tables", []):
            for index, block in enumerate(self.cache.match(as_array(tokens)).tolist()):
                assert self.holds[block] == tokens[: (index + 1) * BLOCK_SIZE]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
