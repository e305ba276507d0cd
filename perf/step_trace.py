"""Where the device waits for the host: read from a profiler's trace of consecutive decode steps.

Each step ends with the copy of its tokens to the host, so these copies mark the steps:

    kernel | gap | copy | gap | kernel kernel kernel | gap | copy | gap | kernel
           |<-- boundary -->|                        |<-- boundary -->|

Idle between steps is the sum of the gaps at the boundaries. Gaps between the kernels of one step
are counted apart: no host is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

STEP_END = "Memcpy DtoH"


@dataclass(frozen=True, slots=True)
class Span:
    """Work of the device: microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Of the whole trace, as shares of its time."""

    steps: int
    between_steps: float
    within_steps: float
    step_us: float  # mean


def idle_of(spans: Iterable[Span]) -> Idle:
    """ValueError where there are fewer than two step ends: then there is no whole step."""
    ordered = sorted(spans, key=lambda span: span.start)
    ends = [i for i, span in enumerate(ordered) if span.name.startswith(STEP_END)]
    if len(ends) < 2:
        raise ValueError(f"expected at least 2 ends of steps in the trace, found {len(ends)}")
    first, last = ends[0], ends[-1]
    between = within = 0.0
    busy_until = ordered[first].end
    for index in range(first + 1, last + 1):
        span, before = ordered[index], ordered[index - 1]
        gap = max(0.0, span.start - busy_until)
        busy_until = max(busy_until, span.end)
        at_boundary = span.name.startswith(STEP_END) or before.name.startswith(STEP_END)
        between, within = (between + gap, within) if at_boundary else (between, within + gap)
    total = ordered[last].end - ordered[first].end
    steps = len(ends) - 1
    return Idle(steps, between / total, within / total, total / steps)


def trace(work: Callable[[], object], file: Path, device: torch.device) -> list[Span]:
    """What the device did during `work`; the trace goes to `file`, for chrome://tracing.

    Of a CPU there are no spans: it has no queue.
    """
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(file))
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]
