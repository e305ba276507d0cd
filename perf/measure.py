"""How long a call takes on its device: the only place that times kernels.

On a GPU the calls are captured into a CUDA graph, so that the host's launch cost stays out. Each
sample is one replay between two events, divided by the number of calls in it. The calls are the
same operation on different buffers, enough of them to exceed the L2 cache several times
(`rotations`): a call finds nothing of its own there. They are repeated until a replay takes a
millisecond, beside which the few microseconds that a graph takes to start are nothing. A call that
cannot be captured (it waits for the device) is launched back to back between the events;
`Timing.mode` says which.

On a CPU the same path runs with the host's clock, for a dry run: it gives no speeds. The first
calls, which compile, and a warm-up, in which clocks settle, are in no sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SAMPLE_S = 1e-3
WARM_UP_S = 0.02
SAMPLING_S = 0.05  # the samples of one measurement take about so long in all
MIN_SAMPLES, MAX_SAMPLES = 5, 50
DRY_SAMPLES = 1
LOW, HIGH = 0.2, 0.8
COLD_FACTOR = 3.0
"""Rotating buffers add up to this many times the L2: half of it would survive a smaller turn."""
MAX_ROTATIONS = 256
"""A graph of more calls gains nothing: what is that small is bound by its launch."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a call, over the samples."""

    median_us: float
    p20_us: float
    p80_us: float
    calls: int  # of a sample
    samples: int
    mode: str  # "graph", "launches" or "host" (dry run)


def rotations(bytes_of_call: int, device: torch.device) -> int:
    """How many sets of buffers make the L2 cold for each of them."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_ROTATIONS, math.ceil(COLD_FACTOR * cache / max(1, bytes_of_call))))


def time_calls(calls: Sequence[Call], device: torch.device, capturable: bool = True) -> Timing:
    """Time one call; `calls` are the operation on rotating buffers. Raises what a call raises."""
    if device.type != "cuda":
        _host_sample(calls)
        return _timing([_host_sample(calls) for _ in range(DRY_SAMPLES)], len(calls), "host")
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    if not capturable:
        return _timing(_device_samples(lambda: _run(calls)), len(calls), "launches")
    repeats = math.ceil(SAMPLE_S / _replay_seconds(calls))
    repeated = [*calls] * repeats
    with _captured(repeated) as graph:
        return _timing(_device_samples(graph.replay), len(repeated), "graph")


@contextmanager
def _captured(calls: Sequence[Call]) -> Iterator[torch.cuda.CUDAGraph]:
    """The calls in order, in one graph; its memory is given back at the end."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls)
    try:
        yield graph
    finally:
        graph.reset()


def _replay_seconds(calls: Sequence[Call]) -> float:
    """Roughly, of the second replay: the first moves the graph to the device."""
    with _captured(calls) as graph:
        graph.replay()
        return min(_seconds_between_events(graph.replay, 2))


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _device_samples(run: Callable[[], None]) -> list[float]:
    """Seconds of each run; their number follows from how long the warm-up's took."""
    run()
    torch.cuda.synchronize()
    began, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - began < WARM_UP_S:
        run()
        torch.cuda.synchronize()
        runs += 1
    expected_s = (time.perf_counter() - began) / runs
    count = max(MIN_SAMPLES, min(MAX_SAMPLES, round(SAMPLING_S / expected_s)))
    return _seconds_between_events(run, count)


def _seconds_between_events(run: Callable[[], None], count: int) -> list[float]:
    """Of each of `count` runs, enqueued without a wait between them."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def _host_sample(calls: Sequence[Call]) -> float:
    began = time.perf_counter()
    _run(calls)
    return time.perf_counter() - began


def _timing(samples_s: list[float], calls: int, mode: str) -> Timing:
    ordered = sorted(1e6 * seconds / calls for seconds in samples_s)

    def quantile(q: float) -> float:
        return ordered[round(q * (len(ordered) - 1))]

    return Timing(quantile(0.5), quantile(LOW), quantile(HIGH), calls, len(ordered), mode)
