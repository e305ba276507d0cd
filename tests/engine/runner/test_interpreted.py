"""The runner over the Triton kernels, in their interpreter: padded rows, a step ahead.

TRITON_INTERPRET=1 python -m pytest tests/engine/runner/test_interpreted.py
"""

import os

import pytest
import torch

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
        prompt = list(range(20 + index, 38))
        world.submit(index, prompt, max_tokens=4, temperature=temperature, ignore_eos=True)
    return {index: got.token_ids for index, got in world.run().items()}


def test_triton_kernels_draw_the_tokens_of_torch(make_runner_world):
    expected = tokens_of(make_runner_world(max_running=4, attention_backend="torch"))
    padded = {"sizes": (4,), "run_ahead": 1}
    world = make_runner_world(max_running=4, attention_backend="triton", **padded)
    assert tokens_of(world) == expected
    rows = [
        cache.isfinite().all(dim=(2, 3)).sum().item() for cache in world.core._runner._step.kv.keys
    ]
    assert rows == [sum(18 - i + 3 for i in range(3))] * len(rows), "padding writes no row"
