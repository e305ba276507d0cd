"""Llama 3.1 8B and 3.2 1B in shape: tokens a second, decode steps over the roofline, idle time.

Random weights, made on the device. Each shape is a part of the suite, in a process of its own, and
each measurement a row. They come in the order of what they tell: where the time runs out, the last
are missing.
"""

from __future__ import annotations

import statistics
import time
from importlib.util import find_spec
from typing import Any

from millrace.engine.core.loop import EngineCore
from millrace.perf.e2e.drive import Scale, drive, random_core, scale_of, submit, take_step
from millrace.perf.e2e.peer import measure_peer, record_absent
from millrace.perf.e2e.row import Measurement, recorded, release
from millrace.perf.kernels.session import Ceilings, Session, Skip
from millrace.perf.roofline import decode_work
from millrace.perf.step_trace import idle_of, trace

BIG, SMALL = "Llama-3.1-8B", "Llama-3.2-1B"
GOALS = {BIG: 1.18, SMALL: 1.3}  # decode step over the roofline
GOAL_STREAMS = 64  # at so many streams and fewer
IDLE_GOAL = 0.02  # of the step, between steps
TRACED_STEPS = 20
WARM_UP_TOKENS = 3


def run_8b(session: Session) -> None:
    """A part of the suite."""
    record_absent(session)
    measure_model(session, BIG)


def run_1b(session: Session) -> None:
    """A part of the suite."""
    measure_model(session, SMALL)


def measure_model(session: Session, name: str) -> None:
    """One shape at each number of streams, its trace, the peer, and the other attention."""
    scale = scale_of(session.dry_run)
    core, steps_us = None, {}
    with recorded(session, "start", name) as row:  # no file is read: the weights are drawn
        began = time.perf_counter()
        core = random_core(scale, scale.shapes[name])
        row.metric, row.value = "s", time.perf_counter() - began
    if core is None:
        return
    for streams in scale.streams:
        if not session.out_of_time():
            with recorded(session, "decode step", f"{name}, {streams} at once") as row:
                measure_streams(row, session, core, name, streams)
                steps_us[streams] = row.facts["step_us"]
    if not session.out_of_time():
        with recorded(session, "idle between steps", f"{name}, {scale.crowd} at once") as row:
            measure_idle(row, session, core, name)
    del core
    release(session.device)
    for streams in scale.peer_streams:
        if not session.out_of_time():
            measure_peer(session, scale, name, streams)
    streams = max(number for number in scale.streams if number <= scale.crowd)
    if not session.out_of_time():
        with recorded(session, "decode step, xformers", f"{name}, {streams} at once") as row:
            require_xformers(session)
            measure_backend(row, session, name, streams, "xformers")
            row.facts["with_ours_us"] = steps_us.get(streams)


def measure_streams(
    row: Measurement, session: Session, core: EngineCore, name: str, streams: int
) -> None:
    """Tokens a second of one batch, and its decode steps against the roofline."""
    scale = scale_of(session.dry_run)
    config = scale.shapes[name]
    vocab = config["vocab_size"]
    drive(core, scale, vocab, streams=1, output_tokens=WARM_UP_TOKENS)  # wakes the clocks
    done = drive(core, scale, vocab, streams, scale.output_tokens)
    steady = done.steady(streams)
    step_s = statistics.median(seconds for seconds, _ in steady)
    context = streams * scale.prompt_tokens + statistics.fmean(drawn for _, drawn in steady)
    assert session.ceilings is not None, "the suite measures the ceilings first"
    roof_s = least_step_s(scale, config, streams, context, session.ceilings)
    row.metric, row.value = "x the roof", step_s / roof_s
    row.goal = GOALS[name] if streams <= GOAL_STREAMS else None
    row.facts = {
        "tokens_per_s": done.num_tokens / done.seconds,
        "decode_tokens_per_s": streams / step_s,
        "step_us": step_s * 1e6,
        "roof_us": roof_s * 1e6,
        "steps": len(steady),
        "prompt_tokens": scale.prompt_tokens,
        "output_tokens": scale.output_tokens,
    }


def require_xformers(session: Session) -> None:
    """Skip where it cannot run."""
    if find_spec("xformers") is None:
        raise Skip("xformers is not installed on this machine")
    if session.device.type != "cuda":
        raise Skip("xformers' attention runs on CUDA only")


def measure_backend(
    row: Measurement, session: Session, name: str, streams: int, backend: str
) -> None:
    """The decode step of an engine of its own with `--attention-backend`.

    As a user gets it: attention that reads lengths on the host cannot be captured in graphs.
    """
    scale = scale_of(session.dry_run)
    settings = {"attention_backend": backend, "max_running": streams}
    core = random_core(scale, scale.shapes[name], **settings)
    vocab = scale.shapes[name]["vocab_size"]
    drive(core, scale, vocab, streams, WARM_UP_TOKENS)
    done = drive(core, scale, vocab, streams, scale.peer_output_tokens)
    step_s = statistics.median(seconds for seconds, _ in done.steady(streams))
    row.metric, row.value = "us", step_s * 1e6
    row.facts = {"output_tokens": scale.peer_output_tokens}


def least_step_s(
    scale: Scale, config: dict[str, Any], streams: int, context: float, ceilings: Ceilings
) -> float:
    """The least time of a decode step on this device, see roofline.py."""
    work = decode_work(config, streams, context, scale.dtype.itemsize)
    return work.roof_s(ceilings.copy_bytes_per_s, ceilings.matmul_flops_per_s)


def measure_idle(row: Measurement, session: Session, core: EngineCore, name: str) -> None:
    """The device's idle time, from a trace of decode steps with nothing but decodes in flight."""
    scale = scale_of(session.dry_run)
    submit(core, scale, scale.shapes[name]["vocab_size"], scale.crowd, scale.output_tokens)
    while take_step(core)[1] != scale.crowd:
        if core.is_idle:
            raise RuntimeError(f"no step decoded {scale.crowd} rows and nothing else")

    def steps() -> None:
        for _ in range(TRACED_STEPS):
            take_step(core)

    file = session.folder / f"trace-{name}.json"
    spans = trace(steps, file, session.device)
    while not core.is_idle:
        take_step(core)
    if session.dry_run:
        raise Skip("a CPU has no queue that could be idle")
    idle = idle_of(spans)
    row.metric, row.value, row.goal = "of the step", idle.between_steps, IDLE_GOAL
    facts = {"within_steps": idle.within_steps, "step_us": idle.step_us, "steps": idle.steps}
    row.facts = {**facts, "trace": file.name}
