"""A tenant of few requests beside a greedy one. perf/fairness.py has the same in seconds."""

import numpy as np
import pytest

from millrace.engine.core.messages import NewRequest
from millrace.engine.sampling_params import SamplingParams

SMALL_ID = 1000


def submit(world, request_id, tenant, prompt_tokens=20, max_tokens=16):
    prompt = np.random.default_rng(request_id).integers(3, 199, prompt_tokens)
    data, params = prompt.astype("<i4").tobytes(), SamplingParams(seed=7, max_tokens=max_tokens)
    world.core.handle(NewRequest(request_id, data, params, max_tokens, [], 0.0, tenant=tenant))


def steps_to_first_token(world):
    submit(world, SMALL_ID, "small")
    steps = 0
    while SMALL_ID not in world.got:
        world.step()
        steps += 1
    return steps


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_small_tenant_does_not_wait_for_the_slots_of_a_greedy_one(make_world, run_ahead):
    waited = {}
    for policy in ("fair_share", "first_come"):
        world = make_world(policy=policy, max_running=4, run_ahead=run_ahead)
        alone = steps_to_first_token(world)
        world.run()
        world.got.clear()
        for index in range(12):
            submit(world, index, "greedy")
        for _ in range(4):
            world.step()
        waited[policy] = steps_to_first_token(world) - alone
    assert waited["fair_share"] <= 1 + run_ahead  # the step with the slot's last tokens
    assert waited["first_come"] > 30


def test_who_yields_to_another_tenant_gets_the_same_tokens(make_world):
    def tokens(policy):
        world = make_world(policy=policy, max_running=4)
        for index in range(4):
            submit(world, index, "greedy")
        for _ in range(10):
            world.step()
        submit(world, SMALL_ID, "small")
        got = world.run()
        yields = sum(stats.preemptions for stats in world.stats)
        return {request_id: got[request_id].token_ids for request_id in got}, yields

    (fair, yields), (plain, none) = tokens("fair_share"), tokens("first_come")
    assert fair == plain
    assert (yields, none) == (1, 0)
