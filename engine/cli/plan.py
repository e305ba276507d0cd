"""`millrace plan`: what a server with these settings could carry; perf/capacity does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from millrace.engine.config import EngineConfig

UNUSED = frozenset({"model", "revision", "served_name", "device", "attention_backend", "threads"})
"""Settings of a server that a plan does not ask for: --model-shape and --gpu stand for them."""

TRAFFIC, ASSUMED = "Traffic", "Assumptions"

ModelShape = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="llama-3.1-8b and the like, or a config.json"),
]
GpuName = Annotated[str | None, typer.Option(metavar="NAME", help="h100, h200, a100, ...")]
MeasuredFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="a measured run's cost model, instead of shape and GPU"),
]
Rate = Annotated[
    float | None, typer.Option(metavar="N", min=1e-6, help="requests a second to look at, too")
]
SloTtft = Annotated[float, typer.Option(metavar="MS", min=0, help="to the first token, at most")]
SloItl = Annotated[
    float, typer.Option(metavar="MS", min=0, help="between tokens, a request's mean, at most")
]
Attain = Annotated[
    float, typer.Option(metavar="SHARE", min=0.01, max=1.0, help="of requests that meet both")
]
Trace = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=TRAFFIC,
        help="lengths and bursts of azure-code, azure-conversation or mooncake-conversation",
    ),
]
PromptTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=1, rich_help_panel=TRAFFIC, help="without a trace")
]
OutputTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=1, rich_help_panel=TRAFFIC, help="without a trace")
]
ArrivalCv = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        min=0.05,
        max=20.0,
        rich_help_panel=TRAFFIC,
        help="of the gaps between arrivals; 1 is Poisson, more is bursts [default: the trace's]",
    ),
]
SharedPrefix = Annotated[
    int,
    typer.Option(metavar="TOKENS", min=0, rich_help_panel=TRAFFIC, help="that all prompts share"),
]
Requests = Annotated[
    int, typer.Option(metavar="N", min=100, rich_help_panel=TRAFFIC, help="in a simulated run")
]
KvDtype = Annotated[
    str, typer.Option(metavar="TEXT", help="of the KV cache: auto, bfloat16, float32 or fp8")
]
MemoryEfficiency = Annotated[
    float,
    typer.Option(
        metavar="SHARE", min=0.01, max=1.0, rich_help_panel=ASSUMED, help="of the bandwidth"
    ),
]
MatmulEfficiency = Annotated[
    float,
    typer.Option(
        metavar="SHARE", min=0.01, max=1.0, rich_help_panel=ASSUMED, help="of the matrix rate"
    ),
]
StepOverhead = Annotated[
    float, typer.Option(metavar="US", min=0, rich_help_panel=ASSUMED, help="of every step")
]
Reserved = Annotated[
    float,
    typer.Option(metavar="GB", min=0, rich_help_panel=ASSUMED, help="beside weights and KV cache"),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.svg", help="draw goodput against rate here")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="the answer as JSON")]


def plan(
    config: EngineConfig,
    slo_ttft: SloTtft,
    slo_itl: SloItl,
    model_shape: ModelShape = None,
    gpu: GpuName = None,
    measured: MeasuredFile = None,
    rate: Rate = None,
    attain: Attain = 0.99,
    kv_dtype: KvDtype = "auto",
    trace: Trace = None,
    prompt_tokens: PromptTokens = 1024,
    output_tokens: OutputTokens = 256,
    arrival_cv: ArrivalCv = None,
    shared_prefix: SharedPrefix = 0,
    requests: Requests = 1000,
    memory_efficiency: MemoryEfficiency = 0.8,
    matmul_efficiency: MatmulEfficiency = 0.6,
    step_overhead: StepOverhead = 100.0,
    reserved: Reserved = 3.0,
    plot: Plot = None,
    json: JsonFile = None,
) -> None:
    """Say how many requests a second a server could carry within its objectives, without running
    one: the real scheduler, in virtual time, on a GPU known from its data sheet or measured."""
    from millrace.perf.capacity.cost import Assumptions
    from millrace.perf.capacity.plan import Asked, run

    asked = Asked(
        model_shape,
        gpu,
        measured,
        rate,
        slo_ttft,
        slo_itl,
        attain,
        trace,
        prompt_tokens,
        output_tokens,
        arrival_cv,
        shared_prefix,
        kv_dtype,
        requests,
        Assumptions(memory_efficiency, matmul_efficiency, step_overhead * 1e-6, reserved * 1e9),
    )
    run(asked, config, plot, json)
