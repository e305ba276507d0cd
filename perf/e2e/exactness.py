"""Greedy tokens of the GPU in bf16 against those of the CPU in float32, on the same prompts.

bf16 rounds: where the two best logits are nearly equal it may pick the other. So the CPU's tokens
come with the gap between its two best, and the GPU may differ only where that gap is below
TOLERANCE. After such a place the two write different texts, and the rest is not compared. Nobody
asks the GPU for logprobs, so that what is compared are the tokens of its captured graphs.

The built-in model where its weights are on this machine; a random one in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import core_of
from millrace.engine.core.messages import Delta, NewRequest, StepOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.text.tokenizer import load_tokenizer
from millrace.engine.weights.builtin import SMOLLM2, is_here
from millrace.engine.weights.checkpoint import Checkpoint, open_checkpoint
from millrace.engine.weights.locate import resolve
from millrace.perf.e2e.row import recorded
from millrace.perf.kernels.session import Session, Skip
from millrace.perf.random_model import SMALL, TINY, RandomCheckpoint

TOLERANCE = 0.25  # two units in the last place of a bf16 logit between 16 and 32
SMALL_STD = 0.06  # of the random weights: logits spread by about 1.4, far more than bf16 rounds
MAX_RUNNING = 32  # graphs are captured for no more
TEXT = Path(__file__).parents[1] / "bench.py"  # real text that is wherever this file is


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts for a model, and how many tokens to write after each."""

    checkpoint: Checkpoint
    prompts: list[list[int]]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Token:
    """A greedy token of the reference, and by how much its logit was above the next."""

    id: int
    gap: float


def run(session: Session) -> None:
    """A part of the suite: one row for each model."""
    for case, make in (("random weights", _random), ("built-in", _builtin)):
        if session.out_of_time():
            return
        with recorded(session, "greedy tokens", case) as row:
            task = make(session.dry_run)
            row.facts = measure(task, session.device.type)
            row.metric, row.value, row.goal = "wrong", row.facts["wrong"], 0
            if row.value:
                raise RuntimeError(f"tokens differ where the logits are {TOLERANCE} apart")


def measure(task: Task, device: str) -> dict[str, Any]:
    """Counts over all prompts."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    expected = [
        [Token(entry.token_id, float(-np.diff(entry.top_logprobs)[0])) for entry in scored]
        for _, scored in generate(task, "cpu", "float32", logprobs=2)
    ]
    found = [ids for ids, _ in generate(task, device, dtype, logprobs=None)]
    counts = {"equal": 0, "excused": 0, "wrong": 0}
    for row, other in zip(expected, found, strict=True):
        for name, count in compare(row, other).items():
            counts[name] += count
    return counts | {"prompts": len(task.prompts), "tolerance": TOLERANCE}


def compare(expected: list[Token], found: list[int]) -> dict[str, int]:
    """Of one prompt, up to the first difference."""
    equal = 0
    for token, other in zip(expected, found, strict=True):
        if token.id != other:
            excused = token.gap < TOLERANCE
            return {"equal": equal, "excused": int(excused), "wrong": int(not excused)}
        equal += 1
    return {"equal": equal, "excused": 0, "wrong": 0}


def generate(
    task: Task, device: str, dtype: str, logprobs: int | None
) -> list[tuple[list[int], list[Any]]]:
    """Each prompt's greedy tokens, and their logprobs if `logprobs` asks for so many."""
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "max_context": 512}
    settings["max_running"] = MAX_RUNNING
    core, _ = core_of(EngineConfig(**settings), task.checkpoint, "model")
    found: list[tuple[list[int], list[Any]]] = [([], []) for _ in task.prompts]
    for index, prompt in enumerate(task.prompts):
        count = task.output_tokens
        params = SamplingParams(temperature=0.0, max_tokens=count, logprobs=logprobs, seed=0)
        data = np.asarray(prompt, "<i4").tobytes()
        core.handle(NewRequest(index, data, params, count, [], 0.0))
    while not core.is_idle:
        for message in core.step():
            for delta in message.deltas if isinstance(message, StepOutput) else ():
                _take(delta, *found[delta.id])
    return found


def _take(delta: Delta, tokens: list[int], scored: list[Any]) -> None:
    if delta.finish == "error":
        raise RuntimeError(delta.error)
    tokens += delta.token_ids
    scored += delta.logprobs or ()


def _builtin(dry_run: bool) -> Task:
    """Stretches of a file, of 1 to 96 tokens."""
    if dry_run:
        raise Skip("a dry run takes the random weights alone")
    if not is_here(SMOLLM2):
        raise Skip(f"the weights of {SMOLLM2.name} are not on this machine")
    location = resolve(None)
    ids = load_tokenizer(location).encode(TEXT.read_text(encoding="utf-8"))
    prompts = [ids[50 * i : 50 * i + 1 + 5 * i] for i in range(20)]
    return Task(open_checkpoint(location.path), prompts, 24)


def _random(dry_run: bool) -> Task:
    cpu = torch.device("cpu")
    if dry_run:
        prompts = [list(range(3 + i, 12 + 3 * i)) for i in range(3)]
        return Task(RandomCheckpoint(TINY, cpu, torch.float32, std=0.3), prompts, 5)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, SMALL["vocab_size"], 1 + 15 * i).tolist() for i in range(20)]
    return Task(RandomCheckpoint(SMALL, cpu, torch.float32, std=SMALL_STD), prompts, 24)
