"""How much memory the KV cache gets, in blocks; and what to lower where something does not fit.

On a GPU the cache takes what `gpu_memory_fraction` leaves beside everything else. How much that is
gets measured, not estimated: a trial runner, complete but for a cache of one block, captures its
graphs and runs the largest step that the settings allow.

    |<--------------- total * gpu_memory_fraction ---------------->|
    | others | weights | tables, graphs | largest step |  KV cache |   kept free |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest, NotEnoughMemory
from millrace.engine.models.registry import ModelConfig
from millrace.engine.runner.sizes import sizes_for

CPU_TOKENS_PER_SLOT = 1024  # default on CPU: every running request may hold this much context,
CPU_SHARE = 0.5  # within this share of the memory that is free after loading the weights
CPU_ALLOCATION_FAILED = "can't allocate memory"  # torch has no type of its own for it


class MemoryProbe(Protocol):
    """A device's memory, as its driver and torch's allocator tell it; tests bring their own."""

    def free_and_total(self) -> tuple[int, int]:
        """Bytes, with nothing held back by the allocator."""

    def start(self) -> None:
        """Begin to watch what is taken."""

    def peak(self) -> int:
        """The most bytes taken at once since `start`, beyond what was taken then."""


class CudaProbe:
    """A GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        """Counted in what the allocator reserved: what it loses to fragments will be lost again."""
        return torch.cuda.max_memory_reserved(self._device) - self._before


def measured_budget(probe: MemoryProbe, fraction: float, largest_step: Callable[[], object]) -> int:
    """Bytes for the cache, once all else is in place and `largest_step` has been run."""
    probe.start()
    largest_step()
    peak = probe.peak()
    free, total = probe.free_and_total()
    return int(free - (1.0 - fraction) * total) - peak


def largest_that_fits(
    sizes: Sequence[int], budget_of: Callable[[int], int], wanted: int
) -> tuple[int, int]:
    """The first of `sizes` beside which `wanted` bytes are left for the cache, and its budget.

    Else the last, whatever its budget. A size whose step runs out of memory leaves nothing; if that
    is the last, its OutOfMemoryError is raised.
    """
    for size in sizes[:-1]:
        try:
            budget = budget_of(size)
        except torch.OutOfMemoryError:
            continue
        if budget >= wanted:
            return size, budget
    return sizes[-1], budget_of(sizes[-1])


def kv_blocks(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    measured: int | None = None,
) -> int:
    """Blocks of KV for this model: as configured, or by default what the device has room for.

    `measured` is the budget of a GPU in bytes; without it, all that is free is taken for granted.
    Raises InvalidRequest or NotEnoughMemory when not even one block fits.
    """
    block_bytes = model.kv_elements_per_token * dtype.itemsize * config.block_size
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < block_bytes:
            message = f"kv_cache_memory: one KV block takes {block_bytes} bytes, "
            limit = f"at least {block_bytes} bytes"
            message += f"{config.kv_cache_memory} are given"
            raise InvalidRequest(message, "kv_cache_memory", limit)
        return config.kv_cache_memory // block_bytes
    if measured is not None:
        budget = measured
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1.0 - config.gpu_memory_fraction) * total)
    else:
        slots = sizes_for(config, device).max_running
        wanted = slots * CPU_TOKENS_PER_SLOT * block_bytes // config.block_size
        budget = min(wanted, int(available_memory() * CPU_SHARE))
    if budget < block_bytes:
        raise NotEnoughMemory(
            f"no memory is left on {device} for a KV cache: a block takes {block_bytes} bytes and "
            f"{max(budget, 0)} are free; {what_to_lower(config, device)}"
        )
    return budget // block_bytes


@contextmanager
def room_for(what: str, config: EngineConfig, device: torch.device) -> Iterator[None]:
    """Within it, an allocation that fails raises NotEnoughMemory, which says what to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATION_FAILED not in str(
            error
        ):
            raise
        advice = what_to_lower(config, device)
        raise NotEnoughMemory(f"no room for {what} on {device}; {advice}") from error


def what_to_lower(config: EngineConfig, device: torch.device) -> str:
    """Advice, with the settings as they are."""
    sizes = sizes_for(config, device)
    names = [f"max_step_tokens = {sizes.max_step_tokens}", f"max_running = {sizes.max_running}"]
    if config.kv_cache_memory is not None:
        names = [f"kv_cache_memory = {config.kv_cache_memory}", *names]
    elif device.type == "cuda":
        others = "gpu_memory_fraction (if others use the device)"
        names = [f"{others} = {config.gpu_memory_fraction}", *names]
    return "lower " + " or ".join(names) + ", or choose a smaller model or dtype"


def available_memory() -> int:
    """Bytes that this process may still take on the host: the machine's and the cgroup's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:  # no cgroup v2
        return available
    return available if limit == "max" else min(available, int(limit) - used)
