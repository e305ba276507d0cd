"""The checker itself: silent on a sound scheduler, loud about each kind of damage."""

import numpy as np
import pytest

from millrace.scheduler.invariants import InvariantViolated, check
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits, Scheduler


@pytest.fixture
def scheduler():
    """One that decodes in flight, one in the middle of its prompt, one that waits."""
    limits = Limits(
        num_blocks=16,
        block_size=4,
        max_running=2,
        max_step_tokens=14,
        max_waiting=8,
        max_waiting_tokens=100,
    )
    scheduler = Scheduler(limits)
    for request_id, length in enumerate([10, 20, 5]):
        prompt = np.arange(length, dtype=np.int32) + 100 * request_id
        scheduler.submit(Request(request_id, prompt, max_tokens=4))
    scheduler.schedule()
    scheduler.schedule()
    return scheduler


def block_of(scheduler, index):
    """Of request 0's table."""
    return int(scheduler.blocks_of(scheduler.requests[0])[index])


def lose_a_block(scheduler):
    scheduler.pool._num_free -= 1


def free_a_block_twice(scheduler):
    scheduler.pool._free[1] = scheduler.pool._free[0]


def free_a_block_in_use(scheduler):
    scheduler.pool._free[0] = block_of(scheduler, 0)


def miscount_references(scheduler):
    scheduler.pool.refs[block_of(scheduler, 0)] += 1


def share_an_unfinished_block(scheduler):
    block = block_of(scheduler, -1)
    scheduler._slots.add_blocks(np.array([scheduler.requests[1].slot]), np.array([block]))
    scheduler.pool.refs[block] += 1


def lose_a_slot(scheduler):
    scheduler._slots.requests[scheduler.requests[0].slot] = None


def give_a_slot_two_roles(scheduler):
    scheduler._slots.decodes[scheduler.requests[1].slot] = True


def miscount_the_waiting(scheduler):
    scheduler.num_waiting += 1


def miscount_waiting_tokens(scheduler):
    scheduler.waiting_tokens -= 1


def lose_the_queue(scheduler):
    scheduler.policy.pop()


def run_past_the_table(scheduler):
    scheduler._slots.computed[scheduler.requests[0].slot] += 8


def forget_a_parent(scheduler):
    block = block_of(scheduler, 0)
    edge = scheduler.cache._edge[block]
    assert edge.blocks.pop(0) == block
    scheduler.cache._is_cached[block] = False


def cache_other_tokens(scheduler):
    scheduler._slots.tokens(scheduler.requests[0].slot)[0] += 1


def close_without_waiting(scheduler):
    scheduler.requests[0].is_closing = True


def promise_blocks_that_do_not_come(scheduler):
    scheduler._coming_blocks += 1


DAMAGE = [
    lose_a_block,
    free_a_block_twice,
    free_a_block_in_use,
    miscount_references,
    share_an_unfinished_block,
    lose_a_slot,
    give_a_slot_two_roles,
    miscount_the_waiting,
    miscount_waiting_tokens,
    lose_the_queue,
    run_past_the_table,
    forget_a_parent,
    cache_other_tokens,
    close_without_waiting,
    promise_blocks_that_do_not_come,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_check_says_what_is_broken(scheduler, damage):
    check(scheduler)
    damage(scheduler)
    with pytest.raises(InvariantViolated, match=r"\w+"):
        check(scheduler)
