"""End to end on a GPU: tokens a second, decode steps against the roofline, idle time, exactness.

    python -m millrace.perf.gpu_e2e --out DIR --copy-bytes-per-s N --matmul-flops-per-s N

Models of the shapes of Llama 3.1 8B and 3.2 1B with random weights run in this process, through
the core that a server runs, without sockets. `run` is a part of the GPU suite; each measurement is
a row, and one that fails costs itself alone. `--dry-run` takes the same path on a CPU with a tiny
shape: it shows that the path holds, and no speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import core_of
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import NewRequest, StepOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.perf import gpu_exactness, gpu_peer
from millrace.perf.random_model import SHAPES, TINY, RandomCheckpoint
from millrace.perf.roofline import decode_work
from millrace.perf.step_trace import idle_of, trace

Row = dict[str, Any]

FAILED = "FAILED"
GOALS = {"Llama-3.1-8B": 1.18, "Llama-3.2-1B": 1.3}  # decode step over roofline, batch 1 to 64
IDLE_GOAL = 0.02  # of the step, between steps, at batch 64 of the 8B shape
TRACED_STREAMS, TRACED_STEPS = 64, 20


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured: for real, or small enough for a dry run."""

    shapes: Mapping[str, dict[str, Any]]
    streams: tuple[int, ...]
    peer_streams: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    settings: Mapping[str, Any]
    dtype: torch.dtype


REAL = Scale(
    SHAPES,
    (1, 16, 64, 256),
    (16, 64),
    1024,
    256,
    {"device": "cuda", "dtype": "bfloat16", "max_running": 256, "max_step_tokens": 8192}
    | {"max_context": 2048, "prefix_caching": False},
    torch.bfloat16,
)
DRY = Scale(
    {"tiny": TINY},
    (1, 3),
    (2,),
    20,
    6,
    {"device": "cpu", "dtype": "float32", "max_running": 4, "max_step_tokens": 32}
    | {"max_context": 128, "prefix_caching": False, "run_ahead": 1},
    torch.float32,
)


@dataclass(slots=True)
class Drive:
    """A batch of requests, from the first step to the last token."""

    seconds: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """seconds, rows that decoded (-1 beside a prompt), tokens drawn before"""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def run(out: Path, ceilings: Mapping[str, float], dry_run: bool) -> list[Row]:
    """All measurements; `ceilings` has copy_bytes_per_s and matmul_flops_per_s of this device."""
    scale = DRY if dry_run else REAL
    rows: list[Row] = []
    for name, config in scale.shapes.items():
        with recorded(rows, "model", model=name):
            measure_model(rows, scale, name, out, ceilings, is_traced=not dry_run)
        for streams in scale.peer_streams:
            with recorded(rows, "transformers", model=name, streams=streams) as row:
                row |= gpu_peer.measure(config, scale.settings["device"], scale.dtype, streams)
    with recorded(rows, "exactness") as row:
        row |= gpu_exactness.measure(dry_run)
    rows += gpu_peer.absent()
    return rows


@contextmanager
def recorded(rows: list[Row], name: str, **facts: Any) -> Iterator[Row]:
    """A row, filled by the block; an error in the block becomes its status and goes no further."""
    row: Row = {"name": name, **facts, "status": "done"}
    try:
        yield row
    except Exception as error:
        row |= {"status": FAILED, "error": f"{type(error).__name__}: {error}"}
    if len(row) > len(facts) + 2:  # it has something to say
        rows.append(row)
        print(json.dumps(row), flush=True)


def random_core(scale: Scale, config: dict[str, Any]) -> EngineCore:
    """An engine over random weights."""
    checkpoint = RandomCheckpoint(config, torch.device(scale.settings["device"]), scale.dtype)
    core, _ = core_of(EngineConfig(**scale.settings), checkpoint, "random")
    return core


# ---------------------------------------------------------------- measurements


def measure_model(
    rows: list[Row],
    scale: Scale,
    name: str,
    out: Path,
    ceilings: Mapping[str, float],
    is_traced: bool,
) -> None:
    """One shape at each concurrency. The engine's memory is given back at the end."""
    config = scale.shapes[name]
    core = random_core(scale, config)
    for streams in scale.streams:
        with recorded(rows, "throughput", model=name, streams=streams) as row:
            row |= measure(core, scale, config, streams, ceilings, GOALS.get(name))
    if is_traced:
        with recorded(rows, "idle", model=name, streams=TRACED_STREAMS) as row:
            row |= measure_idle(core, scale, config, out / f"trace-{name}.json")
    del core
    gc.collect()
    torch.cuda.empty_cache()


def measure(
    core: EngineCore,
    scale: Scale,
    config: dict[str, Any],
    streams: int,
    ceilings: Mapping[str, float],
    goal: float | None,
) -> Row:
    """Tokens a second of one batch, and its decode steps against the roofline."""
    drive(core, scale, config, streams=1, output_tokens=3)  # wakes the clocks
    done = drive(core, scale, config, streams, scale.output_tokens)
    steady = [(s, drawn) for s, rows, drawn in done.steps if rows == streams]
    step_s = statistics.median(seconds for seconds, _ in steady)
    context = streams * scale.prompt_tokens + statistics.fmean(drawn for _, drawn in steady)
    work = decode_work(config, streams, context, scale.dtype.itemsize)
    roof_s = work.roof_s(ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"])
    return {
        "prompt_tokens": scale.prompt_tokens,
        "output_tokens": scale.output_tokens,
        "tokens_per_s": done.num_tokens / done.seconds,
        "decode_tokens_per_s": streams / step_s,
        "step_us": step_s * 1e6,
        "steps": len(steady),
        "roof_us": roof_s * 1e6,
        "step_over_roof": step_s / roof_s,
        "goal": goal if streams <= 64 else None,
    }


def measure_idle(core: EngineCore, scale: Scale, config: dict[str, Any], file: Path) -> Row:
    """The device's idle time, from a trace of decode steps with nothing but decodes in flight."""
    submit(core, scale, config, TRACED_STREAMS, scale.output_tokens)
    while core.scheduler.num_waiting or take_step(core)[1] != TRACED_STREAMS:
        pass

    def steps() -> None:
        for _ in range(TRACED_STEPS):
            take_step(core)

    idle = idle_of(trace(steps, file))
    while not core.is_idle:
        take_step(core)
    return asdict(idle) | {"goal": IDLE_GOAL, "trace": file.name}


def drive(
    core: EngineCore, scale: Scale, config: dict[str, Any], streams: int, output_tokens: int
) -> Drive:
    """Run one batch to its end."""
    done = Drive()
    submit(core, scale, config, streams, output_tokens)
    began = time.perf_counter()
    while not core.is_idle:
        before, drawn = time.perf_counter(), done.num_tokens
        outputs, rows = take_step(core)
        done.steps.append((time.perf_counter() - before, rows, drawn))
        for output in outputs:
            for delta in output.deltas:
                done.tokens.setdefault(delta.id, []).extend(delta.token_ids)
    done.seconds = time.perf_counter() - began
    if done.num_tokens != streams * output_tokens:
        raise RuntimeError(f"{done.num_tokens} tokens came of {streams} x {output_tokens}")
    return done


def submit(
    core: EngineCore, scale: Scale, config: dict[str, Any], streams: int, output_tokens: int
) -> None:
    """Hand in greedy requests with random prompts of one length, which nothing stops early."""
    random = np.random.default_rng([streams, output_tokens])
    for index in range(streams):
        prompt = random.integers(3, config["vocab_size"], scale.prompt_tokens).astype("<i4")
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, seed=index)
        core.handle(NewRequest(index, prompt.tobytes(), params, output_tokens, [], 0.0))


def take_step(core: EngineCore) -> tuple[list[StepOutput], int]:
    """One step; what it said, and how many rows it decoded (-1: beside a prompt, or no step)."""
    outputs = [message for message in core.step() if isinstance(message, StepOutput)]
    stats = outputs[-1].stats
    return outputs, -1 if stats.prefill_tokens or not stats.step_s else stats.decode_tokens


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write DIR/gpu_e2e.json; returns 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="gpu_e2e", description="End to end on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and traces")
    parser.add_argument("--copy-bytes-per-s", type=float, required=True, metavar="N")
    parser.add_argument("--matmul-flops-per-s", type=float, required=True, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: a tiny shape, no speeds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    ceilings: dict[str, float] = {
        "copy_bytes_per_s": options.copy_bytes_per_s,
        "matmul_flops_per_s": options.matmul_flops_per_s,
    }
    rows = run(options.out, ceilings, options.dry_run)
    (options.out / "gpu_e2e.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["status"] == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
