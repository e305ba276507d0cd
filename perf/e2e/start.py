"""From nothing to the first tokens, in a fresh process, with all that a first start leaves behind.

A *warm* start finds every kernel in Triton's cache and every file in the page cache. A start that
had to compile is not counted: the next one is. Settings are a server's defaults, so with them come
all graphs up to the longest context. What a start consists of is in the row, phase by phase.

    Llama-3.1-8B    weights drawn on the device: 16 GB of files would take the suite's time
    Llama-3.2-1B    weights from safetensors in several files, written here just before

So neither row alone is a server of 8B that starts from its files. The second one gives the rate at
which files are read, and with it the sum of both, which is calculated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from millrace.engine.weights.safetensors import INDEX
from millrace.perf.e2e.drive import scale_of
from millrace.perf.e2e.models import BIG, SMALL
from millrace.perf.e2e.one_start import Order, Started
from millrace.perf.e2e.row import recorded, release
from millrace.perf.kernels.session import Session, Skip
from millrace.perf.random_model import RandomCheckpoint, shapes_of

COMMAND = (sys.executable, "-P", "-m", "millrace.perf.e2e.one_start")
GOAL_S = 20.0
DRAWN, READ = "weights drawn on the device", "weights from files"
MOST_STARTS = 2  # the first may have to compile
SHARD_BYTES = 512 * 2**20
SPARE_DISK = 2.0  # times the files


def run(session: Session) -> None:
    """A part of the suite."""
    drawn = measure(session, BIG, DRAWN, nullcontext())
    if session.out_of_time():
        return
    read = measure(session, SMALL, READ, _files(session, SMALL))
    if drawn is not None and read is not None:
        with recorded(session, "start, calculated", f"{BIG}, {READ}") as row:
            row.metric, row.goal = "s", GOAL_S
            row.value = with_files_s(drawn, read)


def measure(
    session: Session, shape: str, case: str, weights: AbstractContextManager[Path | None]
) -> Started | None:
    """The row of a warm start, while `weights` are there; None where there was none."""
    started = None
    with recorded(session, "start, warm", f"{shape}, {case}") as row, weights as folder:
        started = warm_start(session, shape, folder)
        row.metric, row.goal, row.value = "s", GOAL_S, sum(started.phases.values())
        row.facts = {f"{name}_s": seconds for name, seconds in started.phases.items()}
        row.facts["weights_gb_per_s"] = started.weight_bytes / started.phases["weights"] / 1e9
    return started


def with_files_s(drawn: Started, read: Started) -> float:
    """A start of the model whose weights were drawn, were they read as fast as the other's."""
    rate = read.weight_bytes / read.phases["weights"]
    others = sum(seconds for name, seconds in drawn.phases.items() if name != "weights")
    return others + drawn.weight_bytes / rate


def warm_start(session: Session, shape: str, folder: Path | None) -> Started:
    """The first start that compiles nothing; RuntimeError if none does."""
    for _ in range(MOST_STARTS):
        started = start_once(session, shape, folder)
        if not started.compiled:
            return started
    raise RuntimeError(f"start {MOST_STARTS} compiled {started.compiled} kernels again")


def start_once(session: Session, shape: str, folder: Path | None) -> Started:
    """Start in a process of its own, within the time of the part."""
    scale, limit_s = scale_of(session.dry_run), max(session.deadline - time.monotonic(), 1.0)
    device = {name: scale.settings[name] for name in ("device", "dtype")}
    settings = dict(scale.settings) if session.dry_run else device
    path = None if folder is None else str(folder)
    order = Order(shape, path, settings, session.dry_run, time.monotonic())
    try:
        done = subprocess.run(
            COMMAND,
            input=json.dumps(asdict(order)),
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not started within the {limit_s:.0f} s that were left") from error
    if done.returncode:
        raise RuntimeError(f"the start ended with exit code {done.returncode}")
    return Started(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _files(session: Session, shape: str) -> Iterator[Path]:
    """A folder of the shape's weights, which are in the page cache when it is entered."""
    scale = scale_of(session.dry_run)
    config, dtype = scale.shapes[shape], scale.dtype
    size = sum(torch.Size(dims).numel() for dims in shapes_of(config).values()) * dtype.itemsize
    with TemporaryDirectory(prefix="millrace-start-") as folder:
        if disk_usage(folder).free < SPARE_DISK * size:
            raise Skip(f"{size / 1e9:.1f} GB of files do not fit on the disk")
        save_sharded(config, session.device, dtype, Path(folder))
        release(session.device)
        yield Path(folder)


def save_sharded(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Random weights in Hugging Face's layout, a new file where one has reached `shard_bytes`."""
    checkpoint = RandomCheckpoint(config, device, dtype)
    file_of: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names = checkpoint.names()
    for name in names:
        shard[name] = checkpoint.load(name).cpu()
        if name == names[-1] or sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            file = f"model-{len(set(file_of.values())):05d}.safetensors"
            save_file(shard, folder / file)
            file_of |= dict.fromkeys(shard, file)
            shard = {}
    (folder / INDEX).write_text(json.dumps({"weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(config))
