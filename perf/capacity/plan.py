"""`millrace plan`: put the question together, answer it, and say what was assumed.

The scheduler and its limits are those of a server with the same settings. Time is virtual: no
model is loaded and no GPU is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_scheduler, limits_of
from millrace.engine.errors import InvalidRequest, NotEnoughMemory
from millrace.engine.runner.sizes import sizes_for
from millrace.perf.capacity.cost import Assumptions, Measured, Roofline, load_measured
from millrace.perf.capacity.hardware import gpu_named
from millrace.perf.capacity.latencies import Objectives, Quantiles
from millrace.perf.capacity.search import Answer, Question
from millrace.perf.capacity.shape import shape_named
from millrace.perf.capacity.virtual import VirtualServer
from millrace.perf.capacity.workload import Workload
from millrace.perf.plot import curve_chart
from millrace.perf.sim.traffic import TRACES, Lengths, Shape
from millrace.scheduler.scheduler import Limits, Scheduler

BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
MS = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command."""

    model_shape: str | None
    gpu: str | None
    measured: Path | None
    rate: float | None  # requests a second
    slo_ttft_ms: float
    slo_itl_ms: float
    attain: float
    trace: str | None
    prompt_tokens: int
    output_tokens: int
    arrival_cv: float | None  # None: the trace's, or 1
    shared_prefix: int
    kv_dtype: str  # "auto": as the weights
    requests: int
    assumed: Assumptions


@dataclass(frozen=True, slots=True)
class Plan:
    """The question, and what it rests on, a line each."""

    question: Question
    basis: list[str]


def run(asked: Asked, config: EngineConfig, plot: Path | None, json_file: Path | None) -> None:
    """Answer, print, and write what is to be written. Raises MillraceError for what cannot be."""
    plan = make_plan(asked, config)
    attainable = plan.question.attainable_rate()
    answers = [plan.question.at(attainable)] if attainable else []
    if asked.rate is not None:
        answers.append(plan.question.at(asked.rate))
    console = Console()
    for line in plan.basis:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_verdict(asked, attainable, answers), style="bold", soft_wrap=True)
    console.print(_table(answers))
    result = {
        "basis": plan.basis,
        "attainable_rate": attainable,
        "answers": [asdict(answer) for answer in answers],
    }
    if plot is not None and attainable:
        curve = plan.question.curve(attainable)
        result["curve"] = [asdict(answer) for answer in curve]
        plot.write_text(_picture(asked, curve), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the question


def make_plan(asked: Asked, config: EngineConfig) -> Plan:
    """Raises InvalidRequest for what does not make sense, NotEnoughMemory where nothing fits."""
    if asked.measured is not None:
        server, limits, basis = _measured_server(load_measured(asked.measured), config)
    else:
        server, limits, basis = _assumed_server(asked, config)
    traffic, words = _traffic(asked)
    workload = Workload(
        traffic.prompt,
        traffic.output,
        traffic.gap_cv,
        asked.requests,
        limits,
        asked.shared_prefix,
        config.seed or 0,
    )
    objectives = Objectives(asked.slo_ttft_ms / MS, asked.slo_itl_ms / MS)
    basis.append(words)
    return Plan(Question(server, workload, objectives, asked.attain), basis)


def _traffic(asked: Asked) -> tuple[Shape, str]:
    if asked.trace is None:
        prompt, output = Lengths.fixed(asked.prompt_tokens), Lengths.fixed(asked.output_tokens)
        shape = Shape(prompt, output)
        words = f"prompts of {asked.prompt_tokens} tokens, outputs of {asked.output_tokens}"
    else:
        if asked.trace not in TRACES:
            known = ", ".join(TRACES)
            raise InvalidRequest(f"no trace {asked.trace!r}; known are {known}", "trace", known)
        shape = TRACES[asked.trace]
        means = f"{shape.prompt.mean:.0f} and {shape.output.mean:.0f} tokens"
        words = f"lognormal lengths as in {asked.trace}, {means} on average"
    cv = asked.arrival_cv or shape.gap_cv
    words = f"Traffic: {asked.requests} requests, {words}; gaps with a CV of {cv:.2f}"
    return Shape(shape.prompt, shape.output, cv), words


def _assumed_server(asked: Asked, config: EngineConfig) -> tuple[VirtualServer, int, list[str]]:
    if asked.model_shape is None or asked.gpu is None:
        message = "give --model-shape and --gpu, or --measured"
        raise InvalidRequest(message, "model_shape", "a shape and a GPU, or a measured file")
    shape, gpu = shape_named(asked.model_shape), gpu_named(asked.gpu)
    weight_bytes = BYTES[config.dtype]
    if asked.kv_dtype not in BYTES:
        limit = "one of " + ", ".join(BYTES)
        raise InvalidRequest(f"kv_dtype must be {limit}", "kv_dtype", limit)
    kv_bytes = weight_bytes if asked.kv_dtype == "auto" else BYTES[asked.kv_dtype]
    cost = Roofline(shape, gpu, weight_bytes, kv_bytes, asked.assumed, config.block_size)
    num_blocks = _num_blocks(cost, config)
    max_context = min(config.max_context or shape.max_context, shape.max_context)
    sizes = sizes_for(config, torch.device("cuda"))
    limits = replace(
        limits_of(config, sizes, num_blocks, max_context, shape.window),
        host_blocks=_host_blocks(cost, config),
        block_copy_s=cost.block_copy_s,
    )
    widths = tuple(width for width in shape.layers_by_width if width is not None)
    server = VirtualServer(_maker(config, limits), cost, sizes.run_ahead, widths=widths)
    pool = num_blocks * config.block_size
    assumed = asked.assumed
    basis = [
        f"Model: {shape.name}, {shape.elements / 1e9:.2f} G weights of {weight_bytes} bytes;"
        f" KV {kv_bytes * shape.kv_elements_per_token / 2**10:.0f} KiB a token",
        f"Assumed, from the data sheet of {gpu.name}: {gpu.memory_bytes / 1e9:.0f} GB,"
        f" {gpu.bytes_per_s / 1e12:.2f} TB/s, {gpu.flops_per_s / 1e12:.0f} TFLOP/s",
        f"Assumed, not measured: {assumed.memory_efficiency:.0%} of that bandwidth,"
        f" {assumed.matmul_efficiency:.0%} of that rate, {assumed.step_overhead_s * 1e6:.0f} us"
        f" more a step, {assumed.reserved_bytes / 1e9:.1f} GB for graphs and workspaces",
        f"KV cache: {num_blocks} blocks, {pool} tokens; {sizes.max_running} slots,"
        f" {sizes.max_step_tokens} tokens a step, policy {config.policy}",
        *_special(cost, limits),
    ]
    return server, _longest(server), basis


def _special(cost: Roofline, limits: Limits) -> Iterator[str]:
    """What only some servers have."""
    shape = cost.shape
    for width, count in shape.layers_by_width.items():
        if width is not None:
            freed = "" if shape.window is None else "; blocks behind it go back"
            yield f"Window: {count} of {len(shape.windows)} layers see {width} tokens{freed}"
    if limits.host_blocks:
        rate = cost.gpu.link_bytes_per_s / 1e9
        yield (
            f"Swap: {limits.host_blocks} blocks on the host; assumed, from the data sheet:"
            f" {rate:.0f} GB/s each way, of which {cost.assumed.memory_efficiency:.0%}"
        )


def _host_blocks(cost: Roofline, config: EngineConfig) -> int:
    """As a server has them: none beside a window (engine/runner/assemble.py)."""
    return 0 if cost.shape.window is not None else int(config.swap_memory // cost.block_bytes)


def _measured_server(
    measured: Measured, config: EngineConfig
) -> tuple[VirtualServer, int, list[str]]:
    max_context = min(config.max_context or measured.max_context, measured.max_context)
    sizes = sizes_for(config, torch.device(measured.device))
    make = _maker(config, limits_of(config, sizes, measured.num_blocks, max_context))
    server = VirtualServer(make, measured, measured.run_ahead, measured.roughness)
    step, prefill, decode, context = (cost * 1e3 for cost in measured.costs_s)
    basis = [
        f"Measured: {measured.model} on {measured.device}, {measured.num_steps} steps; a step takes"
        f" {step:.2f} ms, a prefill token {prefill:.3f}, a decode {decode:.3f},"
        f" a context token {context:.6f} ms; steps stray by {measured.sigma:.0%}",
        f"KV cache: {measured.num_blocks} blocks of {config.block_size} tokens;"
        f" {sizes.max_running} slots, {sizes.max_step_tokens} tokens a step,"
        f" policy {config.policy}",
    ]
    if config.swap_memory:
        basis.append("Swap: left out, for the file does not say how long a block's copy takes")
    return server, _longest(server), basis


def _num_blocks(cost: Roofline, config: EngineConfig) -> int:
    pool = config.kv_cache_memory or cost.kv_pool_bytes(config.gpu_memory_fraction)
    num_blocks = int(pool // cost.block_bytes)
    if num_blocks < 1:
        need = (
            cost.weight_bytes * cost.shape.elements + cost.assumed.reserved_bytes + cost.block_bytes
        )
        have = cost.gpu.memory_bytes * config.gpu_memory_fraction
        message = f"{cost.shape.name} needs {need / 1e9:.1f} GB on {cost.gpu.name}, of which it may"
        raise NotEnoughMemory(f"{message} take {have / 1e9:.1f}: raise gpu_memory_fraction")
    return num_blocks


def _maker(config: EngineConfig, limits: Limits) -> Callable[[], Scheduler]:
    return lambda: build_scheduler(config, limits)


def _longest(server: VirtualServer) -> int:
    """Tokens of prompt and output that one request may have."""
    return server.make_scheduler().limits.longest


# ---------------------------------------------------------------- the answer


def _verdict(asked: Asked, attainable: float, answers: list[Answer]) -> str:
    wanted = (
        f"{asked.attain:.0%} of requests with TTFT <= {asked.slo_ttft_ms:g} ms"
        f" and ITL <= {asked.slo_itl_ms:g} ms"
    )
    line = f"Attainable: {attainable:.2f} requests/s ({wanted})"
    if not attainable:
        line = f"Not attainable, even for one request at a time: {wanted}"
    if asked.rate is not None:
        answer = answers[-1]
        verb = "meets" if answer.attainment >= asked.attain else "misses"
        line += f"\n{asked.rate:g} requests/s {verb} it: {answer.attainment:.1%} are good"
    return line


def _table(answers: list[Answer]) -> Table:
    """A column a rate."""
    table = Table(box=box.SIMPLE)
    table.add_column("requests/s")
    for answer in answers:
        table.add_column(f"{answer.rate:.2f}", justify="right")
    rows: dict[str, Callable[[Answer], str]] = {
        "good": lambda a: f"{a.attainment:.1%}",
        "goodput, requests/s": lambda a: f"{a.goodput:.2f}",
        "output tokens/s": lambda a: f"{a.tokens_per_s:.0f}",
        "TTFT, ms, p50 / p95 / p99": lambda a: _ms(a.ttft_s),
        "ITL, ms, p50 / p95 / p99": lambda a: _ms(a.itl_s),
        "running, mean / p95": lambda a: f"{a.running_mean:.1f} / {a.running_p95:.0f}",
        "KV cache held, mean / p95": lambda a: f"{a.kv_mean:.1%} / {a.kv_p95:.1%}",
        "refused": lambda a: str(a.refused),
        "preemptions": lambda a: str(a.preemptions),
        "blocks swapped": lambda a: str(a.swapped_blocks),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(answer) for answer in answers))
    return table


def _ms(spread: Quantiles) -> str:
    return " / ".join(f"{value * MS:.1f}" for value in (spread.p50, spread.p95, spread.p99))


def _picture(asked: Asked, curve: list[Answer]) -> str:
    subject = "measured steps" if asked.measured else f"{asked.model_shape} on one {asked.gpu}"
    objectives = f"TTFT {asked.slo_ttft_ms:g} ms, ITL {asked.slo_itl_ms:g} ms"
    return curve_chart(
        f"Goodput: {subject}, {objectives}",
        "requests offered a second",
        "requests a second",
        {
            "offered": [(answer.rate, answer.rate) for answer in curve],
            "within both": [(answer.rate, answer.goodput) for answer in curve],
        },
    )
