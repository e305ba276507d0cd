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
    CaptureBar,
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
    largest_that_fits,
    measured_budget,
    room_for,
)
from millrace.engine.runner.request_table import RequestTable
from millrace.engine.runner.runner import Runner
from millrace.engine.runner.sizes import Sizes, step_sizes
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
CAPTURED = ("triton",)  # backends whose steps never wait for the device, as a capture demands
MakeCalls = Callable[[DeviceStep], DecodeCalls]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A runner, and what came of the memory that there was."""

    runner: Runner
    num_blocks: int
    max_step_tokens: int  # of the largest step that was run


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a runner is made of, but for the number of blocks."""

    config: EngineConfig
    placement: Placement
    decoder: Decoder
    max_context: int
    sizes: Sizes
    make_calls: MakeCalls

    def build(self) -> Assembled:
        """The runner; NotEnoughMemory says what does not fit, and what to lower."""
        device, dtype = self.placement.device, self.placement.dtype
        measured, step_tokens = None, self.sizes.max_step_tokens
        if is_measured(self.config, device):
            with room_for("the largest step", self.config, device):
                step_tokens, measured = self.measure(CudaProbe(device))
            torch.cuda.empty_cache()  # of what the trial leaves behind
        num_blocks = kv_blocks(self.config, self.decoder.config, dtype, device, measured)
        with room_for(f"a KV cache of {num_blocks} blocks", self.config, device):
            step = self.step(num_blocks)
        with room_for("the graphs of decode steps", self.config, device):
            calls = self.make_calls(step)
        if device.type == "cuda" and measured is None:
            with room_for("the largest step", self.config, device):  # and compiles its kernels
                run_worst_case(step, self.copies(step), step_tokens)
        with room_for("the memory for swapping", self.config, device):
            moves = BlockMoves(step.kv.storage, self.host_blocks())
        return Assembled(Runner(step, calls, self.copies(step), moves), num_blocks, step_tokens)

    def host_blocks(self) -> int:
        """Blocks of host memory to swap to; with a window, too little is held to be worth it."""
        model = self.decoder.config
        block_bytes = model.kv_elements_per_token * self.config.block_size
        block_bytes *= self.placement.dtype.itemsize
        return 0 if model.window is not None else self.config.swap_memory // block_bytes

    def measure(self, probe: MemoryProbe, num_blocks: int = 1) -> tuple[int, int]:
        """Tokens of the largest step, and the bytes that the cache may take beside it.

        By a trial runner with a cache of so many blocks. Where nobody said how large a step is, it
        shall leave room for a request of the longest context.
        """
        model, dtype = self.decoder.config, self.placement.dtype
        step = self.step(num_blocks)
        calls = self.make_calls(step)
        copies, fraction = self.copies(step), self.config.gpu_memory_fraction

        def budget_of(tokens: int) -> int:
            return measured_budget(probe, fraction, lambda: run_worst_case(step, copies, tokens))

        context_bytes = self.max_context * model.kv_elements_per_token * dtype.itemsize
        found = largest_that_fits(step_sizes(self.config, self.sizes), budget_of, context_bytes)
        del calls  # its graphs took memory until here
        return found

    def step(self, num_blocks: int) -> DeviceStep:
        """The step over a new table and a new cache."""
        config, model, placement = self.config, self.decoder.config, self.placement
        shape = (num_blocks, config.block_size, model.num_kv_heads, model.head_dim)
        kv = KVCache.allocate(model.num_layers, shape, placement.dtype, placement.device)
        table = RequestTable(
            self.sizes.max_running,
            self.max_context,
            config.block_size,
            model.vocab_size,
            device=placement.device,
        )
        return DeviceStep(self.decoder, placement.operations, kv, table)

    def copies(self, step: DeviceStep) -> Copies:
        """As deep as steps can be in flight: those ahead, and the one that is being launched."""
        in_flight = self.sizes.run_ahead + 1
        return copies_for(self.placement.device, in_flight, step.table.results.nbytes)


def is_measured(config: EngineConfig, device: torch.device) -> bool:
    """Whether a trial runner shows how large the cache may be."""
    return device.type == "cuda" and config.kv_cache_memory is None


def decode_calls(
    placement: Placement,
    max_running: int,
    max_context: int,
    passes: int = 1,
    progress: Progress | None = None,
) -> MakeCalls:
    """How decode steps are called: as graphs of our kernels on CUDA, directly elsewhere.

    `passes` says how often a start will make them: once, or for a trial runner before.
    """
    is_captured = placement.device.type == "cuda" and placement.operations.name in CAPTURED
    bar = None if progress is None else CaptureBar(progress, passes)

    def make(step: DeviceStep) -> DecodeCalls:
        if not is_captured:
            return DirectCalls(step.decode)
        sizes, lengths = ladder(max_running), contexts(max_context)
        recorder = CudaRecorder(placement.device)
        graphs = Graphs(step.decode, sizes, lengths, recorder, step.addresses, bar)
        log.info("%d decode graphs take %.0f MiB", len(graphs), graphs.num_bytes / MIB)
        return graphs

    return make
