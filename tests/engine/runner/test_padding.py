"""Rows that pad a batch: they write nothing, and nobody notices what they read."""

import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import resolve_placement
from millrace.engine.runner.assemble import Placement, decode_calls
from millrace.engine.runner.graphs import DirectCalls
from millrace.kernels.dispatch import TORCH_ON_GPU

PROMPT, OUTPUT = list(range(20, 34)), 9  # into a second block


def caches(world):
    kv = world.core._runner._step.kv
    return [*kv.keys, *kv.values]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sizes", [None, (4,)], ids=["exact", "padded"])
def test_only_computed_positions_are_written(make_runner_world, backend, sizes):
    world = make_runner_world(max_running=4, attention_backend=backend, sizes=sizes, run_ahead=1)
    for cache in caches(world):
        cache.fill_(torch.nan)  # block 0 included, which the padding reads
    world.submit(1, PROMPT, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    got = world.run()[1]
    assert got.finish == ["length"] and len(got.token_ids) == OUTPUT
    for cache in caches(world):
        written = cache.isfinite().flatten(2).all(dim=2)
        assert int(written.sum()) == len(PROMPT) + OUTPUT - 1
        assert cache.isnan().flatten(2).all(dim=2).logical_xor(written).all(), "whole rows only"


def test_the_cache_has_the_blocks_of_the_scheduler_and_no_other(make_runner_world):
    world = make_runner_world(max_running=4)
    assert caches(world)[0].shape[0] == world.core.scheduler.pool.num_blocks


def test_a_backend_that_waits_for_the_device_is_not_captured():
    """The plain torch forms on a GPU read lengths on the host; they take every batch as it is."""
    config = EngineConfig(device="cpu", dtype="float32")
    placement = resolve_placement(config)
    on_gpu = Placement(torch.device("cuda"), placement.dtype, TORCH_ON_GPU)
    ran = []
    calls = decode_calls(on_gpu, 8, 512)(type("Step", (), {"decode": ran.append}))
    assert isinstance(calls, DirectCalls)
