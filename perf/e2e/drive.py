"""An engine over random weights in this process, and batches of requests driven through it.

The core is the one that a server runs, without sockets: messages in, steps, deltas out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import core_of
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import Delta, NewRequest, StepOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.perf.random_model import SHAPES, TINY, RandomCheckpoint


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: for real, or small enough for a dry run on a CPU."""

    shapes: Mapping[str, dict[str, Any]]
    streams: tuple[int, ...]  # the most telling first, should the time run out
    peer_streams: tuple[int, ...]
    crowd: int  # streams beside which one is repeated, and at which determinism is priced
    prompt_tokens: int
    output_tokens: int
    peer_output_tokens: int
    settings: Mapping[str, Any]  # of EngineConfig
    dtype: torch.dtype


REAL = Scale(
    SHAPES,
    (1, 64, 16, 256),
    (16,),
    64,
    1024,
    256,
    64,
    {"device": "cuda", "dtype": "bfloat16", "max_running": 256, "max_step_tokens": 8192}
    | {"max_context": 2048, "prefix_caching": False},
    torch.bfloat16,
)
DRY = Scale(
    dict.fromkeys(SHAPES, TINY),
    (1, 3),
    (2,),
    4,
    20,
    6,
    4,
    {"device": "cpu", "dtype": "float32", "max_running": 4, "max_step_tokens": 32}
    | {"max_context": 128, "prefix_caching": False, "run_ahead": 1},
    torch.float32,
)


@dataclass(slots=True)
class Drive:
    """A batch of requests, from the first step to the last token."""

    seconds: float = 0.0
    num_tokens: int = 0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """seconds, rows that decoded (-1 beside a prompt), tokens drawn before"""

    def steady(self, rows: int) -> list[tuple[float, int]]:
        """Steps that decoded so many rows and nothing else: (seconds, tokens drawn before)."""
        return [(seconds, drawn) for seconds, decoded, drawn in self.steps if decoded == rows]


def scale_of(dry_run: bool) -> Scale:
    """What a run measures."""
    return DRY if dry_run else REAL


def random_core(scale: Scale, config: dict[str, Any], **settings: Any) -> EngineCore:
    """An engine over random weights; `settings` go before the scale's."""
    checkpoint = RandomCheckpoint(config, torch.device(scale.settings["device"]), scale.dtype)
    core, _ = core_of(EngineConfig(**{**scale.settings, **settings}), checkpoint, "random")
    return core


def drive(core: EngineCore, scale: Scale, vocab: int, streams: int, output_tokens: int) -> Drive:
    """Run one batch to its end; RuntimeError if tokens are missing."""
    done = Drive()
    submit(core, scale, vocab, streams, output_tokens)
    began = time.perf_counter()
    while not core.is_idle:
        before, drawn = time.perf_counter(), done.num_tokens
        deltas, rows = take_step(core)
        done.steps.append((time.perf_counter() - before, rows, drawn))
        done.num_tokens += sum(len(delta.token_ids) for delta in deltas)
    done.seconds = time.perf_counter() - began
    if done.num_tokens != streams * output_tokens:
        raise RuntimeError(f"{done.num_tokens} tokens came of {streams} x {output_tokens}")
    return done


def submit(
    core: EngineCore, scale: Scale, vocab: int, streams: int, output_tokens: int, **params: Any
) -> None:
    """Hand in requests with random prompts of one length, which nothing stops early.

    They are greedy unless `params` say otherwise. Request i is the same for any number of streams.
    """
    for index in range(streams):
        prompt = prompt_of(index, scale, vocab)
        chosen = {"temperature": 0.0, "max_tokens": output_tokens, "seed": index} | params
        sampling = SamplingParams(**chosen)
        core.handle(NewRequest(index, prompt.tobytes(), sampling, output_tokens, [], 0.0))


def prompt_of(index: int, scale: Scale, vocab: int) -> np.ndarray:
    """The random prompt of request `index`, int32."""
    random = np.random.default_rng(index)
    return random.integers(3, vocab, scale.prompt_tokens).astype("<i4")


def take_step(core: EngineCore) -> tuple[list[Delta], int]:
    """One step; what it said, and how many rows it decoded (-1: beside a prompt, or no step).

    RuntimeError if a request failed.
    """
    outputs = [message for message in core.step() if isinstance(message, StepOutput)]
    deltas = list(_checked(outputs))
    stats = outputs[-1].stats
    return deltas, -1 if stats.prefill_tokens or not stats.decode_tokens else stats.decode_tokens


def _checked(outputs: list[StepOutput]) -> Iterator[Delta]:
    for delta in (delta for output in outputs for delta in output.deltas):
        if delta.finish in ("error", "refused"):
            raise RuntimeError(f"request {delta.id}: {delta.error}")
        yield delta
