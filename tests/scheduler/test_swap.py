"""Blocks on the host: who leaves them there, when they come back, and when they are free again."""

import numpy as np
import pytest

from millrace.scheduler.cost_model import CostModel, StepLoad
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.request import Request
from millrace.scheduler.swap import HostPool, num_shared

A_TOKEN_S = 0.01
TABLE = np.arange(20, 26, dtype=np.int32)


def trained() -> CostModel:
    """A token of a prompt takes A_TOKEN_S."""
    cost = CostModel()
    for index in range(50):
        load = StepLoad(prefill_tokens=10 * (index % 7), decodes=index % 5, context_tokens=0)
        cost.measured(load, 1.0 + A_TOKEN_S * load.prefill_tokens)
    return cost


def make_pool(num_blocks: int = 8, copy_s: float = 0.0) -> HostPool:
    return HostPool(num_blocks, copy_s, trained())


def make_request() -> Request:
    return Request(0, np.arange(30, dtype=np.int32), max_tokens=4)


def test_what_is_swapped_out_comes_back_behind_what_is_still_cached():
    pool, request, plan = make_pool(), make_request(), StepPlan(1)
    pool.swap_out(request, TABLE[:4], first=1, num_tokens=14)
    assert [block for block, _ in pool.swap_outs] == [21, 22, 23]
    places = [place for _, place in pool.swap_outs]
    assert pool.swap_in(plan, request, 2, np.arange(6, dtype=np.int32)) == 14
    assert plan.swap_ins == [(places[1], 2), (places[2], 3)]
    assert pool.num_free == 8 and request.swapped is None


@pytest.mark.parametrize("num_hits", [0, 4, 5])
def test_blocks_that_do_not_go_on_from_what_is_cached_are_of_no_use(num_hits):
    pool, request, plan = make_pool(), make_request(), StepPlan(1)
    pool.swap_out(request, TABLE[:4], first=1, num_tokens=14)
    assert pool.swap_in(plan, request, num_hits, TABLE) == 0
    assert plan.swap_ins == [] and pool.num_free == 8


def test_at_least_one_token_is_left_to_compute():
    pool, request, plan = make_pool(), make_request(), StepPlan(1)
    pool.swap_out(request, TABLE, first=0, num_tokens=30)
    assert pool.swap_in(plan, request, 0, TABLE) == 29


@pytest.mark.parametrize(("copy_s", "is_swapped"), [(0.01, True), (0.03, False)])
def test_only_what_takes_longer_to_compute_is_copied(copy_s, is_swapped):
    """14 tokens are computed in 0.14 s; three blocks go out and in."""
    pool, request = make_pool(copy_s=copy_s), make_request()
    pool.swap_out(request, TABLE[:3], first=0, num_tokens=14)
    assert (request.swapped is not None) == is_swapped


def test_the_host_pool_is_bounded_and_takes_all_or_nothing():
    pool, first, second = make_pool(num_blocks=5), make_request(), make_request()
    pool.swap_out(first, TABLE[:3], first=0, num_tokens=14)
    pool.swap_out(second, TABLE[:3], first=0, num_tokens=14)
    assert second.swapped is None and pool.num_free == 2
    pool.drop(first)
    assert pool.num_free == 5


def test_without_measurements_nothing_is_swapped():
    pool, request = HostPool(8, 0.0, CostModel()), make_request()
    pool.swap_out(request, TABLE, first=0, num_tokens=14)
    assert request.swapped is None


@pytest.mark.parametrize(("refs", "shared"), [([1, 1], 0), ([3, 2, 1, 1], 2), ([2, 2], 2), ([], 0)])
def test_shared_blocks_are_those_at_the_beginning_that_others_hold(refs, shared):
    assert num_shared(np.asarray(refs, np.int32)) == shared
