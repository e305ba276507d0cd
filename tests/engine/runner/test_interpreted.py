"""The runner over the Triton kernels, in their interpreter: padded rows, a step ahead.

TRITON_INTERPRET=1 python -m pytest tests/engine/runner/test_interpreted.py
"""

import os
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels import (
    fused_model,
    linear_choice,
    matmul_persistent_triton,
    sampling_triton,
)
from millrace.kernels.configs import LaunchConfig

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


def tokens_of(world):
    """Of three requests over a cache of NaN: what is read before it was written shows."""
    kv = world.core._runner._step.kv
    for cache in (*kv.keys, *kv.values):
        cache.fill_(torch.nan)
    for index in range(3):
        temperature = 0.9 if index == 1 else 0.0
        prompt = list(range(34 + index, 38))
        world.submit(index, prompt, max_tokens=3, temperature=temperature, ignore_eos=True)
    return {index: got.token_ids for index, got in world.run().items()}


def test_triton_kernels_draw_the_tokens_of_torch(make_runner_world):
    expected = tokens_of(make_runner_world(max_running=4, attention_backend="torch"))
    padded = {"sizes": (4,), "run_ahead": 1}
    world = make_runner_world(max_running=4, attention_backend="triton", **padded)
    assert tokens_of(world) == expected
    rows = [
        cache.isfinite().all(dim=(2, 3)).sum().item() for cache in world.core._runner._step.kv.keys
    ]
    assert rows == [sum(4 - i + 2 for i in range(3))] * len(rows), "padding writes no row"


@pytest.fixture
def drawn_by(monkeypatch):
    """Counts, of the launches, the draws by the last layer and those by the sampler."""
    counter = Counter()
    for module, name in ((fused_model, "draw_from_hidden"), (sampling_triton, "sample_triton")):
        form = getattr(module, name)

        def counted(*arguments, name=name, form=form, **options):
            counter[name] += 1
            return form(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    return counter


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_last_layer_draws_what_the_sampler_does(
    save_model, world_module, drawn_by, monkeypatch
):
    """Where it was measured to be faster; a neighbour's logprobs ask for the logits."""
    path = save_model("qwen2", num_hidden_layers=1).path
    tokens = []
    for draw_rows, neighbour in ((0, {}), (64, {}), (64, {"logprobs": 1})):
        measured = LaunchConfig(4, 1, {"MAX_ROWS": draw_rows})
        monkeypatch.setattr(fused_model, "NOT_MEASURED", measured)
        drawn_by.clear()
        world = world_module.World(path, max_running=4, attention_backend="triton")
        asked = {"max_tokens": 2, "ignore_eos": True}
        world.submit(0, [5, 6], temperature=0.0, **asked)
        world.submit(1, [7, 8, 9], temperature=0.9, **asked)
        if neighbour:
            world.submit(2, [3], temperature=0.5, **asked, **neighbour)
        world.run()
        tokens.append([world.tokens(0), world.tokens(1)])
        by_layer = draw_rows and not neighbour
        assert set(drawn_by) == {"draw_from_hidden" if by_layer else "sample_triton"}
    assert all(drawn == tokens[0] for drawn in tokens)


@pytest.fixture
def ordered_matmul(monkeypatch):
    """The interpreter multiplies with NumPy, whose BLAS sums a row in an order that depends on
    where in the matrix it stands. Matrix units do not do that, and neither does this."""

    def matmul(a, b, dtype):
        a, b = a.astype(dtype), b.astype(dtype)
        return np.add.reduce(a[:, :, None] * b[None], axis=1)  # over a middle axis: in order

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture
def prefills_from_six_rows(monkeypatch):
    """Six rows go to the persistent product, as on a GPU 65 do. It takes the decode's steps of K:
    the interpreter adds up a step before it adds it to the others, where a matrix unit goes on."""
    wide = {**matmul_persistent_triton.CONSTANTS_FLOAT32, "BLOCK_K": 128}
    monkeypatch.setattr(matmul_persistent_triton, "CONSTANTS_FLOAT32", wide)
    monkeypatch.setattr(linear_choice, "MAX_ROWS", 5)


@pytest.mark.usefixtures("ordered_matmul", "prefills_from_six_rows")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_deterministic_logprobs_are_the_same_bits_alone_in_a_crowd_and_in_chunks(
    save_model, world_module
):
    path = save_model("qwen3", num_hidden_layers=1).path
    asked = {"max_tokens": 2, "temperature": 0.8, "ignore_eos": True, "logprobs": 2}
    prompt = np.random.default_rng(0).integers(3, 199, 9).tolist()
    settings = {"max_running": 2, "attention_backend": "triton", "deterministic": True}
    results = []
    for max_step_tokens, crowded in ((16, False), (5, True)):
        world = world_module.World(path, max_step_tokens=max_step_tokens, **settings)
        if crowded:
            world.submit(1, prompt[:2], **asked)
        world.submit(0, prompt, prompt_logprobs=0, **asked)
        world.run()
        results.append(world.got[0])
    alone, together = results
    assert together.token_ids == alone.token_ids
    assert together.logprobs == alone.logprobs
    assert together.prompt_logprobs == alone.prompt_logprobs
