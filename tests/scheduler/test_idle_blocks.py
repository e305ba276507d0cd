"""IdleBlocks against an ordered dictionary."""

from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.scheduler.idle_blocks import MOST_STRUCK_OUT, IdleBlocks

NUM_BLOCKS = 6
BLOCKS = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=NUM_BLOCKS)
CHANGES = st.lists(st.tuples(st.sampled_from(["rest", "wake", "pop"]), BLOCKS), max_size=40)


def ids(blocks: list[int]) -> np.ndarray:
    return np.array(blocks, np.int32)


@given(CHANGES)
def test_blocks_are_taken_in_the_order_in_which_they_came_to_rest(changes):
    idle, model = IdleBlocks(NUM_BLOCKS), OrderedDict()
    for change, drawn in changes:
        resting = [block for block in drawn if block in model]
        if change == "rest":
            coming = [block for block in drawn if block not in model]
            idle.add(ids(coming))
            model.update(dict.fromkeys(coming))
        elif change == "wake":
            idle.remove(ids(resting))
            for block in resting:
                del model[block]
        else:
            expected = [model.popitem(last=False)[0] for _ in resting]
            assert idle.pop_oldest(len(resting)).tolist() == expected
        assert list(idle) == list(model)
        assert len(idle) == len(model)


def test_a_single_block_can_wake():
    idle = IdleBlocks(NUM_BLOCKS)
    idle.add(ids([3, 1]))
    idle.remove(3)
    assert list(idle) == [1]


def test_blocks_that_rest_and_wake_for_ever_do_not_lengthen_the_queue():
    idle = IdleBlocks(NUM_BLOCKS)
    idle.add(ids([5]))
    for _ in range(100):
        idle.add(ids([0, 1, 2]))
        idle.remove(ids([0, 1, 2]))
    assert sum(len(blocks) for _, blocks in idle._queue) <= MOST_STRUCK_OUT * NUM_BLOCKS
    assert list(idle) == [5]
