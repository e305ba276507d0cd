"""Steps ahead of their results: the same streams and the same ends as without, whatever happens.

Each test is a way in which such a runner has gone wrong: rows or blocks given away while a step
still used them, results read late, requests that ended while they were in flight.
"""

import numpy as np
import pytest

from millrace.engine.core.messages import Cancel
from millrace.scheduler.invariants import check

BLOCK_BYTES = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
PENALISED = {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.6}
AHEAD = pytest.mark.parametrize("run_ahead", [1, 2, 3])


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 199, length).tolist()


def streams(world):
    return {i: (got.token_ids, got.finish) for i, got in world.got.items()}


def stopping_requests(make_world):
    """Parameters of requests that stop at their 3rd, 6th, 9th, ... greedy token."""
    world = make_world()
    for index in range(4):
        world.submit(index, prompt_of(14 + index, index), temperature=0.0, ignore_eos=True)
    world.run()
    return [[world.tokens(i)[3 * i + 2]] for i in range(4)]


def run_mixed_lot(world, stops):
    """Stops, lengths of one token and more, penalties, reused slots, arrivals in the middle."""
    for index in range(16):
        params = {"temperature": 0.0, "stop_token_ids": stops[index % 4]}
        if index % 3 == 1:
            params = PENALISED
        length = 14 + index % 4
        max_tokens = 1 + index % 5 if index % 3 == 2 else 16
        world.submit(index, prompt_of(length, index % 4), max_tokens, **params)
        world.step()
    world.run()
    check(world.core.scheduler)
    return streams(world)


@AHEAD
@pytest.mark.parametrize("sizes", [None, (1, 2, 4)], ids=["exact", "padded"])
@pytest.mark.parametrize("num_blocks", [40, 5], ids=["room", "preemption"])
def test_the_same_streams_and_ends(make_world, run_ahead, sizes, num_blocks):
    stops = stopping_requests(make_world)
    settings = {"max_running": 4, "kv_cache_memory": num_blocks * BLOCK_BYTES}
    expected = run_mixed_lot(make_world(**settings), stops)
    world = make_world(run_ahead=run_ahead, sizes=sizes, **settings)
    assert run_mixed_lot(world, stops) == expected
    assert {finish for _, ends in expected.values() for finish in ends} == {"stop", "length"}
    if num_blocks == 5:
        assert sum(stats.preemptions for stats in world.stats) > 0


@AHEAD
def test_a_request_is_not_planned_past_its_last_token(make_world, run_ahead):
    world = make_world(run_ahead=run_ahead)
    world.submit(1, prompt_of(20), max_tokens=4, ignore_eos=True)
    world.run()
    assert sum(stats.decode_tokens for stats in world.stats) == 3  # and one from the prompt's step
    assert len(world.tokens(1)) == 4


@AHEAD
def test_a_stopped_row_stays_where_it_is(make_world, run_ahead):
    """The steps launched past a stop move neither its position nor anybody else's blocks."""
    world = make_world(run_ahead=run_ahead)
    world.submit(1, prompt_of(15), temperature=0.0, ignore_eos=True)
    stop = world.run()[1].token_ids[0]
    world.submit(2, prompt_of(15), temperature=0.0, stop_token_ids=[stop], max_tokens=60)
    table = world.core._runner._table
    positions = []
    while not world.core.is_idle:
        world.step()
        positions.append(int(table.computed.max()))
    assert world.tokens(2) == [stop]
    assert max(positions) == 15  # of the stop token itself
    world.submit(3, prompt_of(15), temperature=0.0, ignore_eos=True)
    assert world.run()[3].token_ids == world.tokens(1)


@AHEAD
def test_the_prefix_cache_holds_only_what_was_computed(make_world, run_ahead):
    """A stop token that fills a block is cached with it: its KV must be there."""
    world = make_world(run_ahead=run_ahead)
    world.submit(1, prompt_of(15), temperature=0.0, ignore_eos=True)
    whole = world.run()[1].token_ids
    world.submit(2, prompt_of(15), temperature=0.0, stop_token_ids=[whole[0]])
    world.run()
    world.submit(3, prompt_of(15) + whole[:2], temperature=0.0, ignore_eos=True)
    assert world.run()[3].token_ids[:14] == whole[2:16]


@AHEAD
def test_cancelled_requests_give_back_and_disturb_nobody(make_world, run_ahead):
    world = make_world(max_running=3)
    world.submit(0, prompt_of(20), max_tokens=40, ignore_eos=True)
    expected = world.run()[0].token_ids
    world = make_world(run_ahead=run_ahead, max_running=3)
    world.submit(0, prompt_of(20), max_tokens=40, ignore_eos=True)
    for index in range(1, 14):  # slots 1 and 2 change hands at every other step
        world.submit(index, prompt_of(10 + index, index), max_tokens=50, ignore_eos=True)
        world.step()
        world.step()
        world.core.handle(Cancel([index]))
    world.run()
    assert world.tokens(0) == expected
    assert all(world.got[index].finish == ["cancelled"] for index in range(1, 14))
    assert world.core.scheduler.pool.num_referenced == 0
    check(world.core.scheduler)


@AHEAD
def test_a_failing_launch_ends_what_runs_and_nothing_else(make_world, monkeypatch, run_ahead):
    world = make_world(run_ahead=run_ahead)
    world.submit(1, prompt_of(30), max_tokens=20, ignore_eos=True)
    expected = world.run()[1].token_ids
    world.submit(2, prompt_of(30), max_tokens=20, ignore_eos=True)
    for _ in range(4):
        world.step()

    def fail(*_):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(world.core._runner._step.model, "forward", fail)
        world.step()
    assert world.got[2].finish == ["error"]
    world.submit(3, prompt_of(30), max_tokens=20, ignore_eos=True)
    assert world.run()[3].token_ids == expected


@AHEAD
@pytest.mark.parametrize("sizes", [None, (4,)], ids=["exact", "padded"])
def test_logprobs_come_with_their_own_tokens(make_world, run_ahead, sizes):
    """Every step writes them to the same place, so they must be on their way before the next one
    is launched; in steps of decodes alone, and in those that compute a prompt besides."""
    asked = {1: {"logprobs": 2, "prompt_logprobs": 1}, 3: {"logprobs": 0}, 4: {"logprobs": 20}}
    worlds = [
        make_world(max_running=4),
        make_world(max_running=4, run_ahead=run_ahead, sizes=sizes),
    ]
    for world in worlds:
        for index in (1, 2, 3, 4):
            more = asked.get(index, {})
            world.submit(index, prompt_of(29 + index), 8, seed=3, ignore_eos=True, **more)
            world.step()
        world.run()
    alone, ahead = (world.got for world in worlds)
    assert not ahead[2].logprobs
    for index, wanted in asked.items():
        entries = ahead[index].logprobs
        assert [entry.token_id for entry in entries] == ahead[index].token_ids
        assert {len(entry.top_ids) for entry in entries} == {wanted["logprobs"]}
        assert entries == alone[index].logprobs
        assert ahead[index].prompt_logprobs == alone[index].prompt_logprobs
    for entry in ahead[4].logprobs:
        if entry.rank <= 20:
            place = entry.rank - 1
            assert entry.top_ids[place] == entry.token_id
            assert entry.top_logprobs[place] == entry.logprob
