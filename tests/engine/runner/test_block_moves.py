"""Whole blocks moved before a step: out to the host, across the pool, in from the host."""

import pytest
import torch

from millrace.engine.models.forward_batch import KVCache
from millrace.engine.runner import block_moves
from millrace.engine.runner.block_moves import BlockMoves
from millrace.engine.runner.packed import PackedArrays
from millrace.scheduler.plan import StepPlan

LAYERS, BLOCKS, HOST_BLOCKS = 3, 6, 4
CPU = torch.device("cpu")


@pytest.fixture(params=[block_moves.MAX_STAGED_BYTES, 1], ids=["at once", "in the smallest parts"])
def kv(request, monkeypatch):
    """A cache in which every number tells its layer, block and place."""
    monkeypatch.setattr(block_moves, "MAX_STAGED_BYTES", request.param)
    kv = KVCache.allocate(LAYERS, (BLOCKS, 4, 2, 8), torch.float32, CPU)
    kv.storage.copy_(torch.arange(kv.storage.numel()).view(kv.storage.shape))
    return kv


def run(moves, **fields):
    plan, packed = StepPlan(1, **fields), PackedArrays()
    moves.pack(plan, packed)
    buffer = torch.empty(packed.num_bytes, dtype=torch.uint8)
    packed.write(buffer.numpy())
    moves.run(plan, packed.views(buffer))


def test_blocks_are_copied_in_every_layer_and_no_other_changes(kv):
    before = kv.storage.clone()
    run(BlockMoves(kv.storage), block_copies=[(1, 4), (2, 0)])
    assert torch.equal(kv.storage[:, :, [4, 0]], before[:, :, [1, 2]])
    assert torch.equal(kv.storage[:, :, [1, 2, 3, 5]], before[:, :, [1, 2, 3, 5]])
    for layer in range(LAYERS):  # what the layers see is the same memory
        assert torch.equal(kv.keys[layer][4], before[layer, 0, 1])
        assert torch.equal(kv.values[layer][4], before[layer, 1, 1])


def test_a_source_may_be_another_copys_destination(kv):
    before = kv.storage.clone()
    run(BlockMoves(kv.storage), block_copies=[(1, 2), (2, 3), (3, 1)])
    assert torch.equal(kv.storage[:, :, [2, 3, 1]], before[:, :, [1, 2, 3]])


def test_what_was_swapped_out_comes_back_wherever_it_is_put(kv):
    before, moves = kv.storage.clone(), BlockMoves(kv.storage, HOST_BLOCKS)
    run(moves, swap_outs=[(0, 3), (5, 1)])
    kv.storage.fill_(torch.nan)
    run(moves, swap_ins=[(1, 2), (3, 4)])
    assert torch.equal(kv.storage[:, :, [2, 4]], before[:, :, [5, 0]])
    assert kv.storage[:, :, [0, 1, 3, 5]].isnan().all()


def test_a_step_swaps_out_before_it_copies_and_copies_before_it_swaps_in(kv):
    before, moves = kv.storage.clone(), BlockMoves(kv.storage, HOST_BLOCKS)
    run(moves, swap_outs=[(0, 0), (1, 1)])
    run(moves, swap_outs=[(2, 2)], block_copies=[(3, 2), (4, 5)], swap_ins=[(0, 4)])
    run(moves, swap_ins=[(2, 0)])
    assert torch.equal(kv.storage[:, :, [2, 5, 4, 0]], before[:, :, [3, 4, 0, 2]])
    run(moves, swap_outs=[(1, 0)], swap_ins=[(0, 3)])  # a host block that is free again
    assert torch.equal(kv.storage[:, :, 3], before[:, :, 1])


def test_measuring_the_copies_changes_nothing(kv):
    before = kv.storage.clone()
    assert BlockMoves(kv.storage, HOST_BLOCKS).measured_copy_s() > 0
    assert torch.equal(kv.storage, before)
    assert BlockMoves(kv.storage).measured_copy_s() == 0


def test_a_plan_without_moves_sends_nothing(kv):
    packed = PackedArrays()
    BlockMoves(kv.storage).pack(StepPlan(1), packed)
    assert packed.num_bytes == 0
