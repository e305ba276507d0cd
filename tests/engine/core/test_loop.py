"""The core as its callers see it: messages in, deltas out, every request with exactly one end."""

import time

import numpy as np
import pytest
import torch

from millrace.engine.core.messages import CacheFlushed, Cancel, FlushCache
from millrace.scheduler.invariants import check


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 199, length).tolist()


def test_length_finish_says_so_once(make_world):
    world = make_world()
    world.submit(1, prompt_of(20), max_tokens=5, ignore_eos=True)
    got = world.run()[1]
    assert len(got.token_ids) == 5
    assert got.finish == ["length"]


def test_stop_token_ends_and_is_reported(make_world):
    world = make_world()
    world.submit(1, prompt_of(20), max_tokens=8, temperature=0.0, ignore_eos=True)
    third = world.run()[1].token_ids[2]
    world.submit(2, prompt_of(20), max_tokens=8, temperature=0.0, stop_token_ids=[third])
    got = world.run()[2]
    assert got.finish == ["stop"]
    assert got.last.stop_token_id == third
    assert got.token_ids.index(third) == len(got.token_ids) - 1


def test_min_tokens_holds_the_stop_back(make_world):
    world = make_world()
    world.submit(1, prompt_of(20), max_tokens=8, temperature=0.0, ignore_eos=True)
    first = world.run()[1].token_ids[0]
    world.submit(2, prompt_of(20), temperature=0.0, stop_token_ids=[first], min_tokens=4)
    got = world.run()[2]
    assert first not in got.token_ids[:4]


def blocks_in_use(world):
    return world.core.scheduler.pool.num_referenced


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_frees_blocks_in_the_step_after(make_world, steps):
    world = make_world(max_step_tokens=16)
    world.submit(1, prompt_of(50), max_tokens=100, ignore_eos=True)
    for _ in range(steps):
        world.step()
    world.core.handle(Cancel([1]))
    world.step()
    assert blocks_in_use(world) == 0
    assert world.got[1].finish == ["cancelled"]
    check(world.core.scheduler)


def test_cancel_with_a_step_in_flight_frees_blocks_once_it_is_applied(make_world):
    world = make_world(run_ahead=2)
    world.submit(1, prompt_of(30), max_tokens=100, ignore_eos=True)
    for _ in range(5):
        world.step()
    world.core.handle(Cancel([1]))
    world.run()
    assert blocks_in_use(world) == 0
    assert world.got[1].finish == ["cancelled"]
    check(world.core.scheduler)


def test_cancelling_one_leaves_its_neighbour_alone(make_world):
    world = make_world()
    world.submit(1, prompt_of(30), max_tokens=20, ignore_eos=True)
    expected = world.run()[1].token_ids
    world.submit(2, prompt_of(30), max_tokens=20, ignore_eos=True)
    world.submit(3, prompt_of(31, seed=1), max_tokens=20, ignore_eos=True)
    for _ in range(6):
        world.step()
    world.core.handle(Cancel([3, 3, 999]))
    world.run()
    assert world.tokens(2) == expected
    assert world.got[3].finish == ["cancelled"]


def test_deadline_ends_a_request_wherever_it_is(make_world):
    world = make_world(max_running=1)
    now = time.monotonic()
    world.submit(1, prompt_of(30), max_tokens=400, ignore_eos=True, deadline_s=now + 0.05)
    world.submit(2, prompt_of(30), max_tokens=4, deadline_s=now - 1.0)
    world.run()
    assert world.got[1].finish == ["deadline"]
    assert 0 < len(world.tokens(1)) < 400
    assert world.got[2].finish == ["deadline"]
    assert world.tokens(2) == []


def test_a_request_that_can_never_fit_is_refused(make_world):
    bytes_per_block = 2 * 3 * 2 * 8 * 4 * 16
    world = make_world(kv_cache_memory=4 * bytes_per_block)
    world.submit(1, prompt_of(60), max_tokens=100)
    world.step()
    last = world.got[1].last
    assert (last.finish, last.field, last.retry_after_s) == ("refused", "max_tokens", 0.0)


def test_a_full_queue_refuses_with_a_hint(make_world):
    world = make_world(max_waiting=2)
    for request_id in range(3):
        world.submit(request_id, prompt_of(5), max_tokens=2)
    world.run()
    assert [world.got[i].finish[0] == "refused" for i in range(3)] == [False, False, True]
    assert world.got[2].last.retry_after_s > 0


def test_siblings_share_the_prompt(make_world):
    world = make_world()
    prompt = prompt_of(50)
    for index in range(4):
        leader = 10 if index else None
        world.submit(10 + index, prompt, max_tokens=8, leader=leader, seed=index, ignore_eos=True)
    for _ in range(3):
        world.step()
    # 3 full blocks of 16 shared by all, one private block each.
    assert blocks_in_use(world) == 3 + 4
    world.run()
    assert [world.got[10 + i].last.cached_tokens for i in range(4)] == [0, 48, 48, 48]
    assert len({tuple(world.tokens(10 + i)) for i in range(4)}) == 4


def test_prefix_cache_reports_its_hits_and_can_be_flushed(make_world):
    world = make_world()
    world.submit(1, prompt_of(40), max_tokens=4, ignore_eos=True)
    world.run()
    world.submit(2, prompt_of(40), max_tokens=4, ignore_eos=True)
    world.run()
    assert world.got[2].last.cached_tokens == 39  # two blocks, and in a copy all but the last token
    assert world.tokens(1) == world.tokens(2)
    world.core.handle(FlushCache(5))
    world.step()
    assert world.answers == [CacheFlushed(5, 3)]
    world.submit(3, prompt_of(40), max_tokens=4, ignore_eos=True)
    world.run()
    assert world.got[3].last.cached_tokens == 0


def test_logprobs_are_those_of_the_model(make_world, tiny_llama):
    world = make_world()
    prompt = prompt_of(30)
    world.submit(1, prompt, max_tokens=6, logprobs=3, temperature=0.8, ignore_eos=True)
    got = world.run()[1]
    with torch.inference_mode():
        whole = torch.tensor([prompt + got.token_ids])
        expected = tiny_llama.reference(whole).logits[0].log_softmax(-1)
    for offset, entry in enumerate(got.logprobs):
        row = expected[len(prompt) - 1 + offset]
        assert entry.token_id == got.token_ids[offset]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
        assert entry.rank == 1 + (row > row[entry.token_id]).sum().item()
        assert entry.top_ids == row.topk(3).indices.tolist()
        assert entry.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("budget", [8, 13, 64])
def test_prompt_logprobs_cover_the_prompt_once_whatever_the_chunks(make_world, tiny_llama, budget):
    world = make_world(max_step_tokens=budget)
    prompt = prompt_of(45)
    world.submit(1, prompt, max_tokens=2)  # fills the prefix cache, which must not shorten these
    world.run()
    world.submit(2, prompt, max_tokens=1, prompt_logprobs=2)
    got = world.run()[2].prompt_logprobs
    with torch.inference_mode():
        expected = tiny_llama.reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in got] == prompt[1:]
    for position, entry in enumerate(got):
        row = expected[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
        assert entry.top_ids == row.topk(2).indices.tolist()


def test_prompt_logprobs_survive_preemption(make_world):
    bytes_per_block = 2 * 3 * 2 * 8 * 4 * 16
    world = make_world(kv_cache_memory=8 * bytes_per_block, max_step_tokens=16)
    for index in range(3):
        world.submit(index, prompt_of(60, index), max_tokens=60, ignore_eos=True, prompt_logprobs=0)
    got = world.run()
    assert sum(stats.preemptions for stats in world.stats) > 0
    for index in range(3):
        scored = [entry.token_id for entry in got[index].prompt_logprobs]
        assert scored == prompt_of(60, index)[1:]


def test_a_failing_step_ends_its_requests_and_not_the_engine(make_world, monkeypatch):
    world = make_world()
    world.submit(1, prompt_of(30), max_tokens=20, ignore_eos=True)
    expected = world.run()[1].token_ids
    world.submit(2, prompt_of(30), max_tokens=20, ignore_eos=True)
    world.submit(3, prompt_of(12, seed=4), max_tokens=20, ignore_eos=True)
    for _ in range(4):
        world.step()
    runner = world.core._runner

    def fail(hidden):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner._step.model, "logits", fail)
        world.step()
    assert world.got[2].finish == world.got[3].finish == ["error"]
    assert "out of memory" in world.got[2].last.error
    world.submit(4, prompt_of(30), max_tokens=20, ignore_eos=True)
    assert world.run()[4].token_ids == expected


def test_nan_logits_fail_their_own_row_only(make_world, monkeypatch):
    world = make_world()
    world.submit(1, prompt_of(30), max_tokens=10, ignore_eos=True)
    expected = world.run()[1].token_ids
    world.submit(2, prompt_of(30), max_tokens=10, ignore_eos=True)
    world.submit(3, prompt_of(12, seed=4), max_tokens=10, ignore_eos=True)
    for _ in range(3):
        world.step()
    model = world.core._runner._step.model
    logits = model.logits

    def poison_second_row(hidden):
        poisoned = logits(hidden)
        poisoned[1, 7] = torch.nan
        return poisoned

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", poison_second_row)
        world.step()
    world.run()
    assert world.got[3].finish == ["error"]
    assert world.tokens(2) == expected


@pytest.mark.parametrize("policy", ["first_come", "priority", "fair_share", "deadline"])
def test_every_policy_serves_the_same_tokens(make_world, prompts, policy):
    plain, other = make_world(), make_world(policy=policy, itl_target_ms=5.0)
    for world in (plain, other):
        for index, prompt in enumerate(prompts):
            world.submit(index, prompt, max_tokens=6, temperature=0.0)
        world.run()
    for index in range(len(prompts)):
        assert other.tokens(index) == plain.tokens(index)


def test_measured_steps_teach_the_cost_model(make_world):
    world = make_world(itl_target_ms=1000.0, run_ahead=1)
    for index in range(4):
        world.submit(index, prompt_of(20, index), max_tokens=12, ignore_eos=True)
    world.run()
    assert world.core.scheduler.cost.prefill_s(100) > 0.0
