"""deterministic=True on a CPU: logprobs of prompts and outputs, bit for bit, whatever happens."""

import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import resolve_placement
from millrace.engine.errors import InvalidRequest

NUM_TOP = 3
COMPARED = (0, 4, 7, 9)  # of the prompts: 1, 17 and 90 tokens, and one that begins as others do
ASKED = {"logprobs": NUM_TOP, "temperature": 0.9, "ignore_eos": True}


@pytest.fixture(autouse=True)
def threads():
    """Three deal a batch out in parts that are no whole rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def submit(world, index, prompts, **more):
    world.submit(index, prompts[index], max_tokens=8, seed=index, **(ASKED | more))


def said(world, index):
    got = world.got[index]
    return got.token_ids, got.logprobs, got.prompt_logprobs


@pytest.fixture(scope="module")
def alone(tiny_llama, prompts, world_class):
    """What each prompt got when it had the engine to itself, prompt scored and not."""
    results = {}
    for index in COMPARED:
        world = world_class(tiny_llama.path, prefix_caching=False, deterministic=True)
        submit(world, index, prompts, prompt_logprobs=NUM_TOP)
        world.run()
        results[index] = said(world, index)
    return results


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="crowd"),
        pytest.param({"max_step_tokens": 9}, id="small chunks"),
        pytest.param({"sizes": (8,), "run_ahead": 1}, id="padded batches, a step ahead"),
    ],
)
def test_the_same_bits_as_alone(make_world, prompts, alone, settings):
    world = make_world(deterministic=True, **settings)
    for index in range(len(prompts)):
        submit(world, index, prompts, prompt_logprobs=NUM_TOP)
    world.run()
    assert {index: said(world, index) for index in alone} == alone


def test_the_same_bits_from_a_warm_prefix_cache_and_under_preemption(make_world, prompts, alone):
    bytes_per_block = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
    world = make_world(deterministic=True, kv_cache_memory=16 * bytes_per_block)
    for _ in range(2):
        world.got.clear()
        for index in range(len(prompts)):
            submit(world, index, prompts)
        world.run()
        for index, (tokens, logprobs, _) in alone.items():
            assert said(world, index) == (tokens, logprobs, [])
    assert sum(stats.preemptions for stats in world.stats) > 0
    assert sum(stats.prefix_hit_tokens for stats in world.stats) > 0


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "bfloat16"}, {"attention_backend": "reference"}],
    ids=str,
)
def test_where_it_cannot_be_had_it_is_refused(settings):
    with pytest.raises(InvalidRequest, match="deterministic") as refused:
        resolve_placement(EngineConfig(device="cpu", deterministic=True, **settings))
    assert refused.value.field == "deterministic"


def test_auto_takes_float32():
    placement = resolve_placement(EngineConfig(device="cpu", deterministic=True))
    assert placement.dtype == torch.float32
