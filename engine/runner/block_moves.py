"""BlockMoves: KV blocks copied before a step computes: out to the host, across the pool, and in.

    1. swapped out   device -> host, of requests that have yielded
    2. copied        device -> device: all sources are read before any destination is written
    3. swapped in    host -> device, of requests that return

All of it goes through the queue in which the steps are, so each comes after the steps that wrote
its source and before those that read or reuse its place, whatever is in flight; the host waits for
nothing. A block is all layers' K and V of its tokens: the cache is one tensor, and a block is one
index into it. Copies in parts keep what is staged within MAX_STAGED_BYTES: no need to reserve it.

L layers, B blocks, N blocks on the host, P tokens per block, G KV heads, D head dimension.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import Views
from millrace.scheduler.plan import StepPlan

MAX_STAGED_BYTES = 32 * 2**20
MEASURED_BLOCKS = 16


class BlockMoves:
    """Moves blocks of one KV cache, [L, 2, B, P, G, D]; `host_blocks` is N, 0 without swapping."""

    def __init__(self, storage: torch.Tensor, host_blocks: int = 0) -> None:
        self._parts = storage.flatten(0, 1)  # [2 L, B, P, G, D]
        num_parts, num_blocks = self._parts.shape[:2]
        self._block_bytes = storage.nbytes // num_blocks
        self._part_bytes = self._block_bytes // num_parts
        shape = (host_blocks, num_parts, *self._parts.shape[2:])
        self._host = torch.empty(
            shape, dtype=storage.dtype, pin_memory=host_blocks > 0 and storage.is_cuda
        )

    @property
    def num_host_blocks(self) -> int:
        return len(self._host)

    def measured_copy_s(self) -> float:
        """Seconds that one block takes to the host, or back; the blocks tried stay as they are."""
        count = min(MEASURED_BLOCKS, self.num_host_blocks, self._parts.shape[1])
        if count == 0:
            return 0.0
        places, blocks = list(range(count)), torch.arange(count, device=self._parts.device)
        for _ in range(2):  # the first time, memory is touched and kernels are loaded
            began = time.perf_counter()
            self._swap_out(blocks, places)
            self._swap_in(places, blocks)
            if self._parts.is_cuda:
                torch.cuda.synchronize(self._parts.device)
        return (time.perf_counter() - began) / (2 * count)

    def pack(self, plan: StepPlan, packed: PackedArrays) -> None:
        """What the device must know to run this plan's moves."""
        named = {
            "swapped_out": [pair[0] for pair in plan.swap_outs],
            "copied_from": [pair[0] for pair in plan.block_copies],
            "copied_to": [pair[1] for pair in plan.block_copies],
            "swapped_in": [pair[1] for pair in plan.swap_ins],
        }
        for name, blocks in named.items():
            if blocks:
                packed.add(name, np.array(blocks, np.int64))

    def run(self, plan: StepPlan, arrived: Views) -> None:
        """Launch them; `arrived` holds what `pack` has packed."""
        if plan.swap_outs:
            self._swap_out(arrived["swapped_out"], [pair[1] for pair in plan.swap_outs])
        if plan.block_copies:
            self._copy(arrived["copied_from"], arrived["copied_to"])
        if plan.swap_ins:
            self._swap_in([pair[0] for pair in plan.swap_ins], arrived["swapped_in"])

    def _copy(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """By parts, not by blocks: of each part all sources are read before any is written."""
        at_once = max(1, MAX_STAGED_BYTES // (self._part_bytes * len(sources)))
        for i_part in range(0, len(self._parts), at_once):
            parts = self._parts[i_part : i_part + at_once]
            parts.index_copy_(1, destinations, parts.index_select(1, sources))

    def _swap_out(self, blocks: torch.Tensor, places: list[int]) -> None:
        for at, some in self._in_turn(blocks):
            staged = self._parts.index_select(1, some).transpose(0, 1).contiguous()
            for block, place in zip(staged, places[at : at + len(some)], strict=True):
                self._host[place].copy_(block, non_blocking=True)

    def _swap_in(self, places: list[int], blocks: torch.Tensor) -> None:
        for at, some in self._in_turn(blocks):
            staged = self._parts.new_empty(len(some), *self._host.shape[1:])
            for block, place in zip(staged, places[at : at + len(some)], strict=True):
                block.copy_(self._host[place], non_blocking=True)
            self._parts.index_copy_(1, some, staged.transpose(0, 1))

    def _in_turn(self, blocks: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """As many at once as may be staged: (index of the first, these blocks)."""
        at_once = max(1, MAX_STAGED_BYTES // self._block_bytes)
        return [(at, blocks[at : at + at_once]) for at in range(0, len(blocks), at_once)]
