"""Decode steps as one launch each: CUDA graphs for a ladder of batch sizes, and their CPU twin.

A decode step reads and writes nothing but tensors at fixed addresses, so on CUDA it is recorded
once for each size of the ladder and replayed ever after: one launch instead of hundreds. A batch
takes the next size up; the rows in between belong to the scratch slot. On a CPU a launch costs
nothing and a row costs much, so `DirectCalls` has every size and calls the step itself.

    ladder of max_running 40: 1 2 4 8 16 24 32 40

All graphs share one memory pool, so they take what the largest needs: it is captured first. Before
that it runs once without a capture, which compiles kernels and makes whatever they keep. What a
graph has recorded must stay where it is: `replay` compares the addresses.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

Progress = Callable[[str, int, int], None]  # what was captured, how many of, how many

SMALL_SIZES = (1, 2, 4)
STEPS = ((128, 8), (256, 16), (2**31, 32))
"""(up to, step): a padded row costs little beside the weights, and ever less relatively."""


def ladder(max_running: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending; the last is `max_running`."""
    sizes = [size for size in SMALL_SIZES if size < max_running]
    size = 0
    for limit, step in STEPS:
        while size + step <= min(limit, max_running - 1):
            size += step
            sizes.append(size)
    return (*sizes, max_running)


class DecodeCalls(Protocol):
    """Decode steps by batch size."""

    def size_for(self, num_rows: int) -> int:
        """The smallest size that holds so many rows."""

    def replay(self, size: int) -> None:
        """Run the step for one of the sizes."""


class DirectCalls:
    """The step itself, for every size or for those given."""

    def __init__(self, step: Callable[[int], object], sizes: Sequence[int] | None = None) -> None:
        self._step = step
        self._sizes = sizes

    def size_for(self, num_rows: int) -> int:
        if self._sizes is None:
            return num_rows
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, size: int) -> None:
        self._step(size)


class Recorded(Protocol):
    """A captured graph; torch.cuda.CUDAGraph is one."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What captures: CUDA, or a test's stand-in."""

    def warm_up(self, call: Callable[[], object]) -> None:
        """Run a call without recording it, and wait for it."""

    def record(self, call: Callable[[], object]) -> Recorded:
        """Record what a call launches, into the memory that all recordings share."""

    def free_bytes(self) -> int:
        """Of the device's memory."""


class CudaRecorder:
    """Captures on a stream of its own; all graphs share one pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], object]) -> None:
        torch.cuda.synchronize(self._device)  # what was written on other streams is there
        with torch.cuda.stream(self._stream):
            call()
        self._stream.synchronize()

    def record(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile cannot spoil the capture.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
            call()
        return graph

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]


class Graphs:
    """A recorded decode step for each batch size."""

    def __init__(
        self,
        step: Callable[[int], object],
        sizes: Iterable[int],
        recorder: Recorder,
        addresses: Callable[[], list[int]],
        progress: Progress | None = None,
    ) -> None:
        """Record all sizes, largest first. `addresses`: of every tensor the step uses."""
        self._sizes = sorted(sizes)
        self._addresses = addresses
        self._graphs: dict[int, Recorded] = {}
        recorder.warm_up(lambda: step(self._sizes[-1]))
        self._recorded_at = addresses()
        free = recorder.free_bytes()
        for done, size in enumerate(reversed(self._sizes), start=1):
            recorder.warm_up(lambda size=size: step(size))  # type: ignore[misc]
            self._graphs[size] = recorder.record(lambda size=size: step(size))  # type: ignore[misc]
            if progress is not None:
                progress(f"decode graph of {size}", done, len(self._sizes))
        self.num_bytes = free - recorder.free_bytes()

    def size_for(self, num_rows: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, size: int) -> None:
        assert self._addresses() == self._recorded_at, "a tensor moved under a captured graph"
        self._graphs[size].replay()
