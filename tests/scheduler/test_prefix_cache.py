"""PrefixCache: exact, whole blocks only, and the least recently used goes first."""

import numpy as np
import pytest

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.prefix_cache import EDGE, Chain, PrefixCache

NUM_BLOCKS = 64


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, np.int32)


def blocks(*ids: int) -> np.ndarray:
    return np.asarray(ids, np.int32)


def insert(cache: PrefixCache, ids: np.ndarray, table: list[int], chain: Chain | None = None):
    cache.insert(ids, blocks(*table), chain or Chain())


@pytest.fixture
def cache():
    return PrefixCache(block_size=2, num_blocks=NUM_BLOCKS)


def test_the_longest_prefix_of_whole_blocks_is_matched(cache):
    insert(cache, tokens(1, 2, 3, 4, 5), [7, 8, 9])
    assert len(cache) == 2, "the last block is not full"
    assert cache.match(tokens(1, 2, 3, 4, 5, 6)).tolist() == [7, 8]
    assert cache.match(tokens(1, 2, 3)).tolist() == [7]
    assert cache.match(tokens(1)).tolist() == []
    assert cache.match(tokens()).tolist() == []


def test_equal_blocks_behind_different_prefixes_are_different(cache):
    insert(cache, tokens(1, 2, 5, 6), [0, 1])
    insert(cache, tokens(3, 4, 5, 6), [2, 3])
    assert cache.match(tokens(1, 2, 5, 6)).tolist() == [0, 1]
    assert cache.match(tokens(3, 4, 5, 6)).tolist() == [2, 3]
    assert cache.match(tokens(5, 6)).tolist() == []


def test_blocks_with_more_blocks_than_tokens_are_indexed_as_far_as_they_are_full(cache):
    insert(cache, tokens(1, 2), [4, 5])
    assert cache.match(tokens(1, 2, 1, 2)).tolist() == [4]


def test_the_first_of_two_equal_blocks_stays_and_the_other_chain_stays_private(cache):
    insert(cache, tokens(1, 2), [0])
    insert(cache, tokens(1, 2, 3, 4), [5, 6])
    assert cache.match(tokens(1, 2, 3, 4)).tolist() == [0]
    assert cache.rest(blocks(5, 6)).tolist() == [5, 6]


def test_inserting_again_extends_a_chain(cache):
    chain = Chain()
    insert(cache, tokens(1, 2), [0], chain)
    insert(cache, tokens(1, 2, 3, 4), [0, 1], chain)
    assert cache.match(tokens(1, 2, 3, 4)).tolist() == [0, 1]


def test_nothing_is_evicted_while_nothing_rests(cache):
    insert(cache, tokens(1, 2), [0])
    assert cache.num_idle == 0


def test_an_evicted_prefix_is_cached_anew_in_another_block(cache):
    insert(cache, tokens(1, 2), [0])
    cache.rest(blocks(0))
    assert cache.evict(1).tolist() == [0]
    insert(cache, tokens(1, 2), [3])
    assert cache.match(tokens(1, 2)).tolist() == [3]


def test_a_prefix_in_recent_use_outlives_older_chains():
    """A system prompt is used with a long tail, then alone: only its tail has grown old."""
    cache = PrefixCache(block_size=2, num_blocks=NUM_BLOCKS)
    pool = BlockPool(4, cache)
    system, tail, other = pool.take(3).tolist()
    insert(cache, tokens(1, 2, 3, 4), [system, tail])
    pool.give_back(blocks(system, tail))
    insert(cache, tokens(8, 9), [other])
    pool.give_back(blocks(other))
    pool.share(blocks(system))
    pool.give_back(blocks(system))
    pool.take(1)  # the one free block
    assert pool.take(3).tolist() == [tail, other, system]


def test_tenants_see_nothing_of_each_other(cache):
    cache.insert(tokens(1, 2, 3, 4), blocks(0, 1), Chain("a"))
    assert cache.match(tokens(1, 2, 3, 4), "b").tolist() == []
    assert cache.match(tokens(1, 2, 3, 4)).tolist() == []
    cache.insert(tokens(1, 2), blocks(2), Chain("b"))
    assert cache.match(tokens(1, 2, 3, 4), "a").tolist() == [0, 1]
    assert cache.match(tokens(1, 2, 3, 4), "b").tolist() == [2]


@pytest.mark.parametrize("num_blocks", [EDGE - 1, EDGE, EDGE + 1, 2 * EDGE, 3 * EDGE + 2])
@pytest.mark.parametrize("step", [1, 3, EDGE, 100])
def test_long_chains_are_found_whole_however_they_were_put_in(num_blocks, step):
    cache = PrefixCache(2, 4 * EDGE)
    prompt, table, chain = np.arange(2 * num_blocks, dtype=np.int32), np.arange(num_blocks), Chain()
    table = table[::-1].astype(np.int32)
    for end in [*range(step, num_blocks, step), num_blocks]:
        cache.insert(prompt[: 2 * end], table, chain)
        assert chain.num_blocks == end
    for length in range(2 * num_blocks + 1):
        assert cache.match(prompt[:length]).tolist() == table[: length // 2].tolist()
    changed = prompt.copy()
    changed[num_blocks] += 1000
    assert cache.match(changed).tolist() == table[: num_blocks // 2].tolist()


def test_a_shortened_edge_ends_where_its_blocks_end_and_grows_again(cache):
    prompt, table = np.arange(16, dtype=np.int32), np.arange(8, dtype=np.int32)
    cache.insert(prompt, table, Chain())
    cache.rest(table[::-1])
    assert cache.evict(1).tolist() == [7]
    assert cache.match(prompt).tolist() == table[:-1].tolist()
    table[-1] = 40
    cache.insert(prompt, table, Chain(num_blocks=7))
    assert cache.match(prompt).tolist() == table.tolist()


def test_branches_leave_an_edge_at_any_block(cache):
    trunk = np.arange(16, dtype=np.int32)
    cache.insert(trunk, np.arange(8, dtype=np.int32), Chain())
    for first in range(9):  # block on which it leaves, the one behind the last included
        branch = np.append(trunk, tokens(16, 17))
        branch[2 * first :] += 100
        table = np.append(np.arange(first), np.arange(10, 19 - first)).astype(np.int32)
        cache.insert(branch, table, Chain(num_blocks=first))
        assert cache.match(branch).tolist() == table.tolist()
        assert cache.match(trunk).tolist() == list(range(8))
        cache.rest(table[first:][::-1])
        assert sorted(cache.evict(9 - first).tolist()) == sorted(table[first:].tolist())
        assert cache.match(branch).tolist() == list(range(first))
