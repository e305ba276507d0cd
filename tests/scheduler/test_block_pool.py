"""BlockPool: a block is free, referenced or cached, and never two of them."""

import numpy as np
import pytest

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import Chain, PrefixCache


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, np.int32)


def match(cache: PrefixCache, *ids: int) -> list[int]:
    return cache.match(tokens(*ids)).tolist()


@pytest.fixture
def cache():
    return PrefixCache(block_size=2, num_blocks=4)


@pytest.fixture
def pool(cache):
    return BlockPool(4, cache)


def take(pool: BlockPool, count: int) -> np.ndarray:
    blocks = pool.take(count)
    assert blocks is not None
    assert len(blocks) == count
    return blocks


def insert(cache: PrefixCache, ids: np.ndarray, blocks: np.ndarray) -> None:
    cache.insert(ids, blocks, Chain())


def test_every_block_is_taken_once_and_then_none_is_left(pool):
    assert sorted(take(pool, 4)) == [0, 1, 2, 3]
    assert pool.take(1) is None
    assert (pool.num_available, pool.num_referenced) == (0, 4)


def test_given_back_blocks_can_be_taken_again(pool):
    blocks = take(pool, 4)
    pool.give_back(blocks[:2])
    assert pool.num_available == 2
    assert sorted(take(pool, 2)) == sorted(blocks[:2])


def test_a_shared_block_returns_with_its_last_owner(pool, cache):
    blocks = take(pool, 2)
    insert(cache, tokens(1, 2, 3, 4), blocks)
    pool.share(blocks)
    pool.give_back(blocks)
    assert pool.num_referenced == 2
    pool.give_back(blocks)
    assert pool.num_referenced == 0


def test_cached_blocks_are_taken_only_when_no_free_one_is_left(pool, cache):
    cached = take(pool, 2)
    insert(cache, tokens(1, 2, 3, 4), cached)
    pool.give_back(cached)
    assert pool.num_available == 4
    assert not set(take(pool, 2)) & set(cached)
    assert match(cache, 1, 2, 3, 4) == cached.tolist()
    assert take(pool, 1) == cached[1], "the end of a chain goes first"
    assert match(cache, 1, 2, 3, 4) == [cached[0]]


def test_a_shared_idle_block_is_not_evicted(pool, cache):
    cached = take(pool, 1)
    insert(cache, tokens(1, 2), cached)
    pool.give_back(cached)
    pool.share(cached)
    assert cached[0] not in take(pool, 3)
    assert pool.take(1) is None


def test_more_than_there_is_is_not_taken_in_part(pool):
    take(pool, 2)
    assert pool.take(3) is None
    assert pool.num_available == 2


def test_flush_forgets_idle_blocks_and_spares_referenced_ones(pool, cache):
    idle, used = take(pool, 2), take(pool, 1)
    insert(cache, tokens(1, 2, 3, 4), idle)
    insert(cache, tokens(5, 6), used)
    pool.give_back(idle)
    assert pool.flush() == 2
    assert match(cache, 1, 2, 3, 4) == []
    assert match(cache, 5, 6) == used.tolist()
    assert pool.num_available == 3
