"""Greedy tokens of the GPU in bf16 against those of the CPU in float32, on the same prompts.

bf16 rounds: where the two best logits are nearly equal it may pick the other. So the CPU's tokens
come with the gap between its two best, and the GPU may differ only where that gap is below
TOLERANCE. After such a place the two write different texts, and the rest is not compared.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import core_of
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import NewRequest, StepOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.text.tokenizer import load_tokenizer
from millrace.engine.weights.checkpoint import Checkpoint, open_checkpoint
from millrace.engine.weights.locate import resolve
from millrace.perf.random_model import TINY, RandomCheckpoint

PROMPTS, OUTPUT_TOKENS = 20, 24
DRY_PROMPTS, DRY_OUTPUT_TOKENS = 3, 5
TOLERANCE = 0.25  # two units in the last place of a bf16 logit between 16 and 32
TEXT = Path(__file__).parent / "bench.py"  # real text that is wherever this file is


@dataclass(frozen=True, slots=True)
class Token:
    """A greedy token, and by how much its logit was above the next."""

    id: int
    gap: float


def measure(dry_run: bool) -> dict[str, Any]:
    """Counts over all prompts; RuntimeError if a token differs where it must not."""
    prompts, checkpoint = _random() if dry_run else _builtin()
    number = DRY_OUTPUT_TOKENS if dry_run else OUTPUT_TOKENS
    device, dtype = ("cpu", "float32") if dry_run else ("cuda", "bfloat16")
    expected = greedy(checkpoint, prompts, number, "cpu", "float32")
    found = greedy(checkpoint, prompts, number, device, dtype)
    counts = {"equal": 0, "excused": 0, "wrong": 0}
    for row, other in zip(expected, found, strict=True):
        for name, count in compare(row, other).items():
            counts[name] += count
    if counts["wrong"]:
        raise RuntimeError(f"tokens differ where the logits are {TOLERANCE} apart: {counts}")
    return counts | {"prompts": len(prompts), "tolerance": TOLERANCE}


def compare(expected: list[Token], found: list[Token]) -> dict[str, int]:
    """Of one prompt, up to the first difference."""
    equal = 0
    for token, other in zip(expected, found, strict=True):
        if token.id != other.id:
            excused = token.gap < TOLERANCE
            return {"equal": equal, "excused": int(excused), "wrong": int(not excused)}
        equal += 1
    return {"equal": equal, "excused": 0, "wrong": 0}


def greedy(
    checkpoint: Checkpoint, prompts: list[list[int]], output_tokens: int, device: str, dtype: str
) -> list[list[Token]]:
    """Each prompt's greedy tokens."""
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "max_context": 512}
    core, _ = core_of(EngineConfig(**settings), checkpoint, "model")
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, logprobs=2, seed=0)
        data = np.asarray(prompt, "<i4").tobytes()
        core.handle(NewRequest(index, data, params, output_tokens, [], 0.0))
    tokens = _collect(core, len(prompts))
    del core
    gc.collect()
    torch.cuda.empty_cache()
    return tokens


def _collect(core: EngineCore, count: int) -> list[list[Token]]:
    tokens: list[list[Token]] = [[] for _ in range(count)]
    while not core.is_idle:
        for message in core.step():
            for delta in message.deltas if isinstance(message, StepOutput) else ():
                for entry in delta.logprobs or ():
                    best, second = entry.top_logprobs
                    tokens[delta.id].append(Token(entry.token_id, best - second))
    return tokens


def _builtin() -> tuple[list[list[int]], Checkpoint]:
    """The built-in model, and stretches of a file of 1 to 96 tokens."""
    location = resolve(None)
    ids = load_tokenizer(location).encode(TEXT.read_text(encoding="utf-8"))
    prompts = [ids[50 * i : 50 * i + 1 + 5 * i] for i in range(PROMPTS)]
    return prompts, open_checkpoint(location.path)


def _random() -> tuple[list[list[int]], Checkpoint]:
    prompts = [list(range(3 + i, 12 + 3 * i)) for i in range(DRY_PROMPTS)]
    return prompts, RandomCheckpoint(TINY, torch.device("cpu"), torch.float32, std=0.3)
