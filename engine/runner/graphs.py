"""Decode steps as one launch each: CUDA graphs for a ladder of shapes, and their CPU twin.

A decode step reads and writes nothing but tensors at fixed addresses, so on CUDA it is recorded
once for each shape and replayed ever after: one launch instead of hundreds. A batch takes the next
shape up. The rows too many belong to the scratch slot; a context too long costs attention some
programs that find nothing to do. Neither changes a bit of anybody's result. On a CPU a launch costs
nothing and a row costs much, so `DirectCalls` has every shape and calls the step itself.

    rows up to 40                  1 2 4 8 16 24 32 40
    contexts up to 100,000         2048 8192 32768 100000
    draws                          plain, filtered, scored: the most that any row asks for

A third kind at every context would make half as many graphs again, each a capture at the start and
memory of its own, for steps that are rare. So steps with logprobs are recorded at the longest
context alone: 243 graphs, not 324, for 256 rows and a context of 131,072.

All graphs share one memory pool, so they take what the largest needs: it is captured first. Each
runs once before it is captured, which compiles kernels and makes whatever they keep. What a graph
has recorded must stay where it is: `replay` compares the addresses.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch

Progress = Callable[[str, int, int], None]  # what was captured, how many of, how many

SMALL_ROWS = (1, 2, 4)
ROW_STEPS = ((128, 8), (256, 16), (2**31, 32))
"""(up to, step): a padded row costs little beside the weights, and ever less relatively."""
FIRST_CONTEXT, CONTEXT_FACTOR = 2048, 4


class Draws(Enum):
    """The most that any row of a step asks of its draw."""

    PLAIN = "plain"  # a temperature: no filter, no edit of the logits
    FILTERED = "filtered"  # anything but logprobs
    SCORED = "scored"  # logprobs, and anything else


class StepShape(NamedTuple):
    """What a decode step is launched for."""

    rows: int
    context: int  # tokens of the longest row, at most
    draws: Draws


def ladder(max_running: int) -> tuple[int, ...]:
    """Numbers of rows to capture, ascending; the last is `max_running`."""
    sizes = [size for size in SMALL_ROWS if size < max_running]
    size = 0
    for limit, step in ROW_STEPS:
        while size + step <= min(limit, max_running - 1):
            size += step
            sizes.append(size)
    return (*sizes, max_running)


def contexts(max_context: int) -> tuple[int, ...]:
    """Contexts to capture, ascending; the last is `max_context`."""
    lengths = []
    length = FIRST_CONTEXT
    while length < max_context:
        lengths.append(length)
        length *= CONTEXT_FACTOR
    return (*lengths, max_context)


def contexts_of(draws: Draws, lengths: Sequence[int]) -> Sequence[int]:
    """Those of the ascending `lengths` at which steps with such draws are captured."""
    return lengths[-1:] if draws is Draws.SCORED else lengths


def shapes_to_capture(sizes: Sequence[int], lengths: Sequence[int]) -> list[StepShape]:
    """For numbers of rows and contexts, both ascending: the one that needs most memory first."""
    return [
        StepShape(rows, context, draws)
        for rows, context in product(reversed(sizes), reversed(lengths))
        for draws in reversed(Draws)
        if context in contexts_of(draws, lengths)
    ]


@dataclass(slots=True)
class CaptureBar:
    """One progress bar over all captures of a start, however often the ladder is captured."""

    progress: Progress
    passes: int
    done: int = 0

    def advance(self, shapes: int) -> None:
        """One more capture, of so many in a pass."""
        self.done += 1
        self.progress("decode graphs", self.done, shapes * self.passes)


class DecodeCalls(Protocol):
    """Decode steps by shape."""

    def fit(self, needed: StepShape) -> StepShape:
        """The smallest shape that there is for such draws of so many rows and so much context."""

    def replay(self, shape: StepShape) -> None:
        """Run the step in a shape that `fit` gave."""


class DirectCalls:
    """The step itself, for every number of rows or for those given."""

    def __init__(
        self, step: Callable[[StepShape], object], sizes: Sequence[int] | None = None
    ) -> None:
        self._step = step
        self._sizes = sizes

    def fit(self, needed: StepShape) -> StepShape:
        if self._sizes is None:
            return needed
        return needed._replace(rows=_at_least(needed.rows, self._sizes))

    def replay(self, shape: StepShape) -> None:
        self._step(shape)


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
    """A recorded decode step for each shape."""

    def __init__(
        self,
        step: Callable[[StepShape], object],
        sizes: Sequence[int],
        lengths: Sequence[int],
        recorder: Recorder,
        addresses: Callable[[], list[int]],
        bar: CaptureBar | None = None,
    ) -> None:
        """Record `shapes_to_capture` of `sizes` and context `lengths`, both ascending.

        `addresses`: of every tensor that the step uses.
        """
        self._sizes, self._lengths = sizes, lengths
        self._addresses = addresses
        self._graphs: dict[StepShape, Recorded] = {}
        shapes = shapes_to_capture(sizes, lengths)
        recorder.warm_up(partial(step, shapes[0]))
        self._recorded_at = addresses()
        free = recorder.free_bytes()
        for shape in shapes:
            recorder.warm_up(partial(step, shape))
            self._graphs[shape] = recorder.record(partial(step, shape))
            if bar is not None:
                bar.advance(len(shapes))
        self.num_bytes = free - recorder.free_bytes()

    def __len__(self) -> int:
        return len(self._graphs)

    def fit(self, needed: StepShape) -> StepShape:
        lengths = contexts_of(needed.draws, self._lengths)
        return StepShape(
            _at_least(needed.rows, self._sizes), _at_least(needed.context, lengths), needed.draws
        )

    def replay(self, shape: StepShape) -> None:
        assert self._addresses() == self._recorded_at, "a tensor moved under a captured graph"
        self._graphs[shape].replay()


def _at_least(value: int, ascending: Sequence[int]) -> int:
    """The first that is not below `value`."""
    return ascending[bisect_left(ascending, value)]
