"""`--deterministic`: the same bits alone and in a crowd, and what that costs a decode step.

The 8B shape with random weights. One sampled request with logprobs runs alone, then beside a full
batch of others; tokens and logprobs must be equal to the last bit. The price is that of a decode
step of the crowd, against the same step of an engine without the setting, in this process.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from millrace.engine.config import EngineConfig
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import TokenLogprobs
from millrace.perf.e2e.drive import Scale, drive, random_core, scale_of, submit, take_step
from millrace.perf.e2e.models import BIG
from millrace.perf.e2e.row import recorded, release
from millrace.perf.kernels.session import Session, Skip

SETTING = "deterministic"
COST_GOAL = 0.05  # of the step
REPEATED = {"temperature": 0.8, "top_p": 0.9, "logprobs": 3}


def run(session: Session) -> None:
    """A part of the suite; skipped where the engine has no such setting."""
    if SETTING not in {field.name for field in dataclasses.fields(EngineConfig)}:
        raise Skip(f"this engine has no setting {SETTING!r}")
    scale = scale_of(session.dry_run)
    config = scale.shapes[BIG]
    case = f"{BIG}, {scale.crowd} at once"
    settings = {"max_running": scale.crowd}
    plain = step_s(random_core(scale, config, **settings), scale, config)
    release(session.device)
    core = random_core(scale, config, **settings, **{SETTING: True})
    with recorded(session, "alone and in a crowd", case) as row:
        different = different_tokens(core, scale, config["vocab_size"])
        row.metric, row.value, row.goal = "different", different, 0
        if different:
            raise RuntimeError(f"{different} of {scale.output_tokens} tokens or logprobs differ")
    if session.out_of_time():
        return
    with recorded(session, "cost of determinism", case) as row:
        deterministic = step_s(core, scale, config)
        row.metric, row.value, row.goal = "of the step", deterministic / plain - 1, COST_GOAL
        row.facts = {"step_us": deterministic * 1e6, "plain_step_us": plain * 1e6}


def step_s(core: EngineCore, scale: Scale, config: dict[str, Any]) -> float:
    """Median seconds of a decode step of the crowd."""
    done = drive(core, scale, config["vocab_size"], scale.crowd, scale.output_tokens)
    return statistics.median(seconds for seconds, _ in done.steady(scale.crowd))


def different_tokens(core: EngineCore, scale: Scale, vocab: int) -> int:
    """How many of request 0's tokens differ, in themselves or in their logprobs' bits."""
    alone, crowded = (scored(core, scale, vocab, streams) for streams in (1, scale.crowd))
    pairs = zip(alone, crowded, strict=True)
    return sum(one != other for one, other in pairs)


def scored(core: EngineCore, scale: Scale, vocab: int, streams: int) -> list[TokenLogprobs]:
    """Request 0's tokens with their logprobs, beside so many streams less one."""
    submit(core, scale, vocab, streams, scale.output_tokens, **REPEATED)
    found: list[TokenLogprobs] = []
    while not core.is_idle:
        for delta in take_step(core)[0]:
            found += (delta.logprobs or ()) if delta.id == 0 else ()
    return found
