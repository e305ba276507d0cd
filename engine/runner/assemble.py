"""A Runner from its parts: the table, the KV cache as large as memory allows, the graphs.

On CUDA the order matters: a trial runner with a cache of one block captures its graphs and runs the
largest step, which shows what is left for the cache; then it is dropped, and the real one captures
the same graphs again, over the real cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.models.decoder import Decoder, Progress
from millrace.engine.models.forward_batch import KVCache
from millrace.engine.runner.block_moves import BlockMoves
from millrace.engine.runner.copies import Copies, copies_for
from millrace.engine.runner.device_step import DeviceStep
from millrace.engine.runner.graphs import (
    CudaRecorder,
    DecodeCalls,
    DirectCalls,
    Graphs,
    contexts,
    ladder,
)
from millrace.engine.runner.memory import (
    CudaProbe,
    MemoryProbe,
    kv_blocks,
    measured_budget,
    room_for,
)
from millrace.engine.runner.request_table import RequestTable
from millrace.engine.runner.runner import Runner
from millrace.engine.runner.worst_case import run_worst_case
from millrace.kernels.dispatch import Operations


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what precision a model runs."""

    device: torch.device
    dtype: torch.dtype
    operations: Operations


log = logging.getLogger(__name__)

MIB = 2**20
MakeCalls = Callable[[DeviceStep], DecodeCalls]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a runner is made of, but for the number of blocks."""

    config: EngineConfig
    placement: Placement
    decoder: Decoder
    max_context: int
    run_ahead: int
    make_calls: MakeCalls

    def build(self) -> tuple[Runner, int]:
        """The runner, and how many blocks its cache has for requests."""
        device, dtype = self.placement.device, self.placement.dtype
        measured = None
        if device.type == "cuda" and self.config.kv_cache_memory is None:
            with room_for("the largest step", self.config, device):
                measured = self.measure(CudaProbe(device))
            torch.cuda.empty_cache()  # of what the trial leaves behind
        num_blocks = kv_blocks(self.config, self.decoder.config, dtype, device, measured)
        with room_for(f"a KV cache of {num_blocks} blocks", self.config, device):
            step = self.step(num_blocks)
        with room_for("the graphs of decode steps", self.config, device):
            calls = self.make_calls(step)
        if device.type == "cuda" and measured is None:
            with room_for("the largest step", self.config, device):  # and compiles its kernels
                run_worst_case(step, self.copies(), self.config.max_step_tokens)
        return Runner(step, calls, self.copies(), BlockMoves(step.kv.storage)), num_blocks

    def measure(self, probe: MemoryProbe, num_blocks: int = 1) -> int:
        """Bytes that the cache may take, by a trial runner with a cache of so many blocks."""
        step = self.step(num_blocks)
        calls = self.make_calls(step)
        copies, max_step_tokens = self.copies(), self.config.max_step_tokens
        budget = measured_budget(
            probe,
            self.config.gpu_memory_fraction,
            lambda: run_worst_case(step, copies, max_step_tokens),
        )
        del calls  # its graphs took memory until here
        return budget

    def step(self, num_blocks: int) -> DeviceStep:
        """The step over a new table and a new cache."""
        config, model, placement = self.config, self.decoder.config, self.placement
        # One block more than the scheduler knows of: the scratch slot's.
        shape = (num_blocks + 1, config.block_size, model.num_kv_heads, model.head_dim)
        kv = KVCache.allocate(model.num_layers, shape, placement.dtype, placement.device)
        table = RequestTable(
            config.max_running,
            self.max_context,
            config.block_size,
            model.vocab_size,
            scratch_block=num_blocks,
            device=placement.device,
        )
        return DeviceStep(self.decoder, placement.operations, kv, table)

    def copies(self) -> Copies:
        """As deep as steps can be in flight: those ahead, and the one that is being launched."""
        return copies_for(self.placement.device, self.run_ahead + 1)


def decode_calls(
    device: torch.device, max_running: int, max_context: int, progress: Progress | None = None
) -> MakeCalls:
    """How decode steps are called on a device: graphs on CUDA, directly elsewhere."""

    def make(step: DeviceStep) -> DecodeCalls:
        if device.type != "cuda":
            return DirectCalls(step.decode)
        sizes, lengths = ladder(max_running), contexts(max_context)
        recorder = CudaRecorder(device)
        ladders = (sizes, lengths, recorder, step.addresses, progress)
        graphs = Graphs(step.decode, *ladders, step.model.draw_rows)
        log.info("decode graphs take %.0f MiB", graphs.num_bytes / MIB)
        return graphs

    return make
