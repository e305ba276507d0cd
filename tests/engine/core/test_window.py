"""A model whose layers all have a window: blocks behind it go back while the request runs."""

import pytest
import torch

from tests.engine.conftest import save_tiny_model

BLOCK_BYTES = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
WINDOW, OUTPUT = 9, 40


@pytest.fixture(scope="module")
def tiny_mistral(tmp_path_factory):
    return save_tiny_model("mistral", tmp_path_factory.mktemp("mistral"))


def poison_unowned(world):
    """What nobody holds and the prefix cache does not know is NaN from here on."""
    pool, cache = world.core.scheduler.pool, world.core.scheduler.cache
    unowned = torch.from_numpy((pool.refs == 0) & ~cache._is_cached).nonzero()[:, 0]
    kv = world.core._runner._step.kv
    for tensor in (*kv.keys, *kv.values):
        tensor[unowned] = torch.nan


def run(world, prompts):
    for index, prompt in enumerate(prompts):
        world.submit(index, prompt, max_tokens=OUTPUT, temperature=1.0, ignore_eos=True, seed=index)
    while not world.core.is_idle:
        world.step()
        poison_unowned(world)
    return [world.tokens(index) for index in range(len(prompts))]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_request_longer_than_the_pool_gets_the_same_tokens(
    tiny_mistral, world_class, prompts, run_ahead
):
    ample = run(world_class(tiny_mistral.path, max_step_tokens=24), prompts)
    small = world_class(
        tiny_mistral.path,
        max_step_tokens=24,
        run_ahead=run_ahead,
        kv_cache_memory=5 * BLOCK_BYTES,
    )
    assert small.core.scheduler.pool.num_blocks * 16 < max(map(len, prompts))
    assert run(small, prompts) == ample
    assert small.core.scheduler.pool.num_referenced == 0


def test_a_model_with_one_layer_that_sees_all_keeps_all(tmp_path, world_class):
    model = save_tiny_model("qwen2_sliding", tmp_path)
    assert world_class(model.path).core.scheduler.limits.window is None
