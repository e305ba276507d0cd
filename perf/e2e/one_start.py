"""One start of an engine in a process of its own, phase by phase: what `start.py` runs and reads.

    python -m millrace.perf.e2e.one_start < Order as JSON > Started as JSON

It has started when a first request has been answered: a kernel that is compiled only then counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import core_of
from millrace.engine.weights.checkpoint import Checkpoint, open_checkpoint
from millrace.kernels.dispatch import HAS_TRITON
from millrace.perf.e2e.drive import drive, scale_of
from millrace.perf.random_model import RandomCheckpoint

FIRST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Order:
    """What to start."""

    shape: str  # a name in the scale's shapes
    folder: str | None  # of the shape's weights as files; None: they are drawn on the device
    settings: dict[str, Any]  # of EngineConfig
    dry_run: bool
    began_s: float  # of the machine's monotonic clock, when the process was asked for


@dataclass(frozen=True, slots=True)
class Started:
    """What came of it."""

    phases: dict[str, float]  # seconds of each, in order
    compiled: int  # kernels that were not in Triton's cache
    weight_bytes: int


class Watch:
    """Tells the phases of a start apart, by what the engine says of its progress."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._ends: dict[str, float] = {}

    def ended(self, phase: str) -> None:
        """The phase that is under way has ended, or the same one once more."""
        self._ends[phase] = time.monotonic()

    def progress(self, what: str, done: int, total: int) -> None:
        """As `core_of` calls it. The graphs are captured twice: for a trial, and to be used."""
        trial = total // 2
        if what.startswith("layer"):
            self.ended("weights")
        elif done in (1, trial, trial + 1, total):
            names = {1: "first_graph", trial: "trial_graphs", trial + 1: "cache", total: "graphs"}
            self.ended(names[done])

    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in the order of their ends."""
        starts = [self._began_s, *self._ends.values()]
        return {
            name: end - start
            for (name, end), start in zip(self._ends.items(), starts, strict=False)
        }


@contextmanager
def counted_compiling() -> Iterator[list[object]]:
    """A list that grows by an entry for each kernel that Triton compiles."""
    compiled: list[object] = []
    if not HAS_TRITON:
        yield compiled
        return
    import triton

    def listen(*, src: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            compiled.append(getattr(src, "name", src))

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield compiled


def start(order: Order) -> Started:
    """Do it. The imports are behind us."""
    watch = Watch(order.began_s)
    watch.ended("imports")
    scale = scale_of(order.dry_run)
    shape, config = scale.shapes[order.shape], EngineConfig(**order.settings)
    torch.zeros(1, device=config.device)
    watch.ended("device")
    with counted_compiling() as compiled:
        checkpoint: Checkpoint = (
            RandomCheckpoint(shape, torch.device(config.device), scale.dtype)
            if order.folder is None
            else open_checkpoint(Path(order.folder))
        )
        core, ready = core_of(config, checkpoint, order.shape, watch.progress)
        watch.ended("rest")
        drive(core, scale, shape["vocab_size"], streams=1, output_tokens=FIRST_TOKENS)
        watch.ended("first_tokens")
    weight_bytes = ready.num_parameters * scale.dtype.itemsize
    return Started(watch.phases(), len(compiled), weight_bytes)


def main() -> None:
    """Entry point of the process."""
    order = Order(**json.load(sys.stdin))
    print(json.dumps(asdict(start(order))), flush=True)


if __name__ == "__main__":
    main()
