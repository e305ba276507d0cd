"""A request gives the same tokens alone, in a crowd, and whatever happens around it (fp32, CPU)."""

import pytest

SAMPLED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.1, "top_n_sigma": 2.0, "typical_p": 0.9, "temperature_last": True},
    {"temperature": 1.0, "min_p": 0.01, "xtc_probability": 0.7, "xtc_threshold": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.0, "presence_penalty": 1.5, "logit_bias": {5: 3.0, 9: -100.0}},
    {"temperature": 1.0, "allowed_token_ids": [2, 10, 20, 30, 40, 50]},
    {"temperature": 1.0, "banned_token_ids": list(range(60, 120)), "min_tokens": 10},
]


def submit_all(world, prompts):
    for index, prompt in enumerate(prompts):
        params = SAMPLED[index % len(SAMPLED)]
        world.submit(index, prompt, max_tokens=24, **({"seed": 100 + index} | params))


@pytest.fixture(scope="module")
def alone(tiny_llama, prompts, world_class):
    """Every prompt's tokens when it has the engine to itself."""
    tokens = {}
    for index, prompt in enumerate(prompts):
        world = world_class(tiny_llama.path, prefix_caching=False)
        params = SAMPLED[index % len(SAMPLED)]
        world.submit(index, prompt, max_tokens=24, **({"seed": 100 + index} | params))
        world.run()
        tokens[index] = world.tokens(index)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="crowd"),
        pytest.param({"max_step_tokens": 9}, id="small chunks"),
        pytest.param({"block_size": 32}, id="larger blocks"),
        pytest.param({"prefix_caching": False}, id="no prefix cache"),
        pytest.param({"run_ahead": 1}, id="one step ahead"),
        pytest.param({"run_ahead": 2, "max_step_tokens": 16}, id="two steps ahead"),
        pytest.param({"sizes": (1, 2, 4, 8)}, id="padded batches"),
        pytest.param({"sizes": (8,), "run_ahead": 1}, id="padded to the full, one step ahead"),
    ],
)
def test_same_tokens_as_alone(make_world, prompts, alone, settings):
    world = make_world(**settings)
    submit_all(world, prompts)
    world.run()
    assert {index: world.tokens(index) for index in alone} == alone


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_same_tokens_as_alone_under_preemption(make_world, prompts, alone, run_ahead):
    bytes_per_block = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
    world = make_world(run_ahead=run_ahead, kv_cache_memory=14 * bytes_per_block)
    submit_all(world, prompts)
    world.run()
    assert sum(stats.preemptions for stats in world.stats) > 0
    assert {index: world.tokens(index) for index in alone} == alone


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_same_tokens_as_alone_when_blocks_are_swapped_to_the_host(
    make_world, prompts, alone, run_ahead
):
    bytes_per_block = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, dim, fp32, tokens
    memory = {"kv_cache_memory": 14 * bytes_per_block, "swap_memory": 100 * bytes_per_block}
    world = make_world(run_ahead=run_ahead, prefix_caching=False, **memory)
    world.core.scheduler.cost.prompt_s = lambda tokens: float("inf")  # so it is worth it
    submit_all(world, prompts)
    world.run()
    host = world.core.scheduler._tables.host
    assert host.num_swapped_in == host.num_swapped_out > 0
    assert sum(stats.swapped_out_blocks for stats in world.stats) == host.num_swapped_out
    assert sum(stats.swapped_in_blocks for stats in world.stats) == host.num_swapped_in
    assert host.num_free == host.num_blocks == 100
    assert {index: world.tokens(index) for index in alone} == alone


def test_same_tokens_in_any_order_of_arrival(make_world, prompts, alone):
    world = make_world()
    for index in reversed(range(len(prompts))):
        params = SAMPLED[index % len(SAMPLED)]
        world.submit(index, prompts[index], max_tokens=24, **({"seed": 100 + index} | params))
        world.step()
    world.run()
    assert {index: world.tokens(index) for index in alone} == alone


def test_same_tokens_where_an_unfinished_block_is_copied(make_world, prompts, alone):
    """A prompt cached whole, the next turn of a chat, and siblings of one prompt."""
    world = make_world(max_step_tokens=len(prompts[7]) // 2)  # which its chunks fill
    copies, schedule = [], world.core.scheduler.schedule

    def schedule_and_note(now_s):
        plan = schedule(now_s)
        copies.extend(plan.block_copies if plan is not None else ())
        return plan

    world.core.scheduler.schedule = schedule_and_note
    world.submit(0, prompts[6], max_tokens=24, **({"seed": 106} | SAMPLED[6]))
    world.run()
    assert world.tokens(0) == alone[6]
    chat = [*prompts[6], *world.tokens(0)]
    for _ in range(2):
        world.submit(1, chat, max_tokens=8, temperature=0.0)
        world.run()
    fresh = make_world(prefix_caching=False)
    fresh.submit(1, chat, max_tokens=8, temperature=0.0)
    fresh.run()
    assert world.tokens(1) == fresh.tokens(1) * 2
    for sibling in range(10, 13):
        leader = None if sibling == 10 else 10
        seeded = {"seed": 107, "leader": leader} | SAMPLED[7]
        world.submit(sibling, prompts[7], max_tokens=24, **seeded)
    world.run()
    assert all(world.tokens(sibling) == alone[7] for sibling in range(10, 13))
    assert len(copies) == 4, copies
