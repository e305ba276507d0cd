"""BlockPool: a block is free, referenced or cached, and never two of them."""

import numpy as np
import pytest

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import PrefixCache


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, np.int32)


@pytest.fixture
def cache():
    return PrefixCache(block_size=2)


@pytest.fixture
def pool(cache):
    return BlockPool(4, cache)


def take(pool: BlockPool, count: int) -> list[int]:
    blocks = [pool.take() for _ in range(count)]
    assert None not in blocks
    return blocks


def test_every_block_is_taken_once_and_then_none_is_left(pool):
    assert sorted(take(pool, 4)) == [0, 1, 2, 3]
    assert pool.take() is None
    assert (pool.num_available, pool.num_referenced) == (0, 4)


def test_given_back_blocks_can_be_taken_again(pool):
    blocks = take(pool, 4)
    pool.give_back(blocks[:2])
    assert pool.num_available == 2
    assert sorted(take(pool, 2)) == sorted(blocks[:2])


def test_a_shared_block_returns_with_its_last_owner(pool, cache):
    blocks = take(pool, 2)
    cache.insert(tokens(1, 2, 3, 4), blocks)
    pool.share(blocks)
    pool.give_back(blocks)
    assert pool.num_referenced == 2
    pool.give_back(blocks)
    assert pool.num_referenced == 0


def test_cached_blocks_are_taken_only_when_no_free_one_is_left(pool, cache):
    cached = take(pool, 2)
    cache.insert(tokens(1, 2, 3, 4), cached)
    pool.give_back(cached)
    assert pool.num_available == 4
    assert not set(take(pool, 2)) & set(cached)
    assert cache.match(tokens(1, 2, 3, 4)) == cached
    assert pool.take() == cached[1], "the end of a chain goes first"
    assert cache.match(tokens(1, 2, 3, 4)) == cached[:1]


def test_a_shared_idle_block_is_not_evicted(pool, cache):
    cached = take(pool, 1)
    cache.insert(tokens(1, 2), cached)
    pool.give_back(cached)
    pool.share(cached)
    assert cached[0] not in take(pool, 3)
    assert pool.take() is None


def test_flush_forgets_idle_blocks_and_spares_referenced_ones(pool, cache):
    idle, used = take(pool, 2), take(pool, 1)
    cache.insert(tokens(1, 2, 3, 4), idle)
    cache.insert(tokens(5, 6), used)
    pool.give_back(idle)
    assert pool.flush() == 2
    assert cache.match(tokens(1, 2, 3, 4)) == []
    assert cache.match(tokens(5, 6)) == used
    assert pool.num_available == 3
