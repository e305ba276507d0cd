"""PrefixCache: exact, whole blocks only, and the least recently used goes first."""

import numpy as np
import pytest

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import PrefixCache


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, np.int32)


@pytest.fixture
def cache():
    return PrefixCache(block_size=2)


def test_the_longest_prefix_of_whole_blocks_is_matched(cache):
    cache.insert(tokens(1, 2, 3, 4, 5), [7, 8, 9])
    assert len(cache) == 2, "the last block is not full"
    assert cache.match(tokens(1, 2, 3, 4, 5, 6)) == [7, 8]
    assert cache.match(tokens(1, 2, 3)) == [7]
    assert cache.match(tokens(1)) == []
    assert cache.match(tokens()) == []


def test_equal_blocks_behind_different_prefixes_are_different(cache):
    cache.insert(tokens(1, 2, 5, 6), [0, 1])
    cache.insert(tokens(3, 4, 5, 6), [2, 3])
    assert cache.match(tokens(1, 2, 5, 6)) == [0, 1]
    assert cache.match(tokens(3, 4, 5, 6)) == [2, 3]
    assert cache.match(tokens(5, 6)) == []


def test_blocks_with_more_blocks_than_tokens_are_indexed_as_far_as_they_are_full(cache):
    cache.insert(tokens(1, 2), [4, 5])
    assert cache.match(tokens(1, 2, 1, 2)) == [4]


def test_the_first_of_two_equal_blocks_stays_and_the_other_chain_stays_private(cache):
    cache.insert(tokens(1, 2), [0])
    cache.insert(tokens(1, 2, 3, 4), [5, 6])
    assert cache.match(tokens(1, 2, 3, 4)) == [0]
    assert not cache.rest(5)
    assert not cache.rest(6)


def test_inserting_again_extends_a_chain(cache):
    cache.insert(tokens(1, 2), [0])
    cache.insert(tokens(1, 2, 3, 4), [0, 1])
    assert cache.match(tokens(1, 2, 3, 4)) == [0, 1]


def test_nothing_is_evicted_while_nothing_rests(cache):
    cache.insert(tokens(1, 2), [0])
    assert cache.evict() is None


def test_an_evicted_prefix_is_cached_anew_in_another_block(cache):
    cache.insert(tokens(1, 2), [0])
    cache.rest(0)
    assert cache.evict() == 0
    cache.insert(tokens(1, 2), [3])
    assert cache.match(tokens(1, 2)) == [3]


def test_a_prefix_in_recent_use_outlives_older_chains():
    """A system prompt is used with a long tail, then alone: only its tail has grown old."""
    cache = PrefixCache(block_size=2)
    pool = BlockPool(4, cache)
    system, tail, other = (pool.take() for _ in range(3))
    cache.insert(tokens(1, 2, 3, 4), [system, tail])
    pool.give_back([system, tail])
    cache.insert(tokens(8, 9), [other])
    pool.give_back([other])
    pool.share([system])
    pool.give_back([system])
    pool.take()  # the one free block
    assert [pool.take(), pool.take(), pool.take()] == [tail, other, system]
