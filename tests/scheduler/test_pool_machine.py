"""BlockPool and PrefixCache together against a model that remembers what each block holds."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import PrefixCache

BLOCK_SIZE = 2
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def as_array(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


class PoolMachine(RuleBasedStateMachine):
    """Requests take, share, remember and give back blocks in any order."""

    @initialize(num_blocks=st.integers(1, 8))
    def make(self, num_blocks):
        self.cache = PrefixCache(BLOCK_SIZE)
        self.pool = BlockPool(num_blocks, self.cache)
        self.tables: list[tuple[list[int], list[int]]] = []  # tokens, blocks
        self.holds: dict[int, list[int]] = {}  # block -> tokens up to its end

    @rule(tokens=PROMPTS)
    def admit(self, tokens):
        hits = self.cache.match(as_array(tokens[:-1]))
        for index, block in enumerate(hits):
            assert self.holds[block] == tokens[: (index + 1) * BLOCK_SIZE]
        self.pool.share(hits)
        blocks = list(hits)
        while len(blocks) * BLOCK_SIZE < len(tokens):
            block = self.pool.take()
            if block is None:
                self.pool.give_back(blocks)
                return
            assert all(block not in table for _, table in self.tables), "taken from its owner"
            assert block not in blocks, "taken twice"
            blocks.append(block)
            self.holds[block] = tokens[: len(blocks) * BLOCK_SIZE]
        self.tables.append((tokens, blocks))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def remember(self, data):
        tokens, blocks = data.draw(st.sampled_from(self.tables))
        self.cache.insert(as_array(tokens), blocks)
        if len(tokens) >= BLOCK_SIZE:
            assert self.cache.match(as_array(tokens)), "nothing was remembered"

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.give_back(self.tables.pop(index)[1])

    @rule()
    def flush(self):
        self.pool.flush()
        assert self.cache.num_idle == 0

    @rule()
    def take_all_there_is(self):
        """Every block that is called available can be had."""
        taken = [self.pool.take() for _ in range(self.pool.num_available)]
        assert None not in taken
        assert self.pool.take() is None
        self.pool.give_back([block for block in taken if block is not None])

    @invariant()
    def references_are_the_tables(self):
        if not hasattr(self, "pool"):
            return
        held = [block for _, blocks in self.tables for block in blocks]
        assert self.pool.refs == [held.count(block) for block in range(self.pool.num_blocks)]
        assert self.pool.num_referenced == len(set(held))

    @invariant()
    def what_is_matched_is_what_was_written(self):
        for tokens, _ in getattr(self, "tables", []):
            for index, block in enumerate(self.cache.match(as_array(tokens))):
                assert self.holds[block] == tokens[: (index + 1) * BLOCK_SIZE]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
