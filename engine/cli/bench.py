"""`millrace bench`: how fast this machine serves; perf/bench.py does the measuring."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest


class PeerName(StrEnum):
    """What may be measured beside Millrace."""

    transformers = "transformers"
    transformers_fp32 = "transformers-fp32"
    vllm = "vllm"
    vllm_fp32 = "vllm-fp32"


STREAMS = (1, 16, 64)
PEER_STREAMS = (16,)

BenchTarget = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="measure this server instead of starting one"),
]
Streams = Annotated[
    list[int],
    typer.Option(metavar="N", min=1, help="concurrent streams; repeat for several levels"),
]
Repeats = Annotated[
    int, typer.Option(metavar="N", min=1, help="of each level, in turn; medians are reported")
]
PromptTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=1, help="of each prompt, drawn at random")
]
OutputTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=2, help="of each answer; the end of text is ignored")
]
Peers = Annotated[
    list[PeerName],
    typer.Option(help="measure this beside, in turn with Millrace (in bf16, or fp32); repeat"),
]
PeerStreams = Annotated[
    list[int], typer.Option(metavar="N", min=1, help="prompts of a peer's batch; repeat")
]
Tenants = Annotated[
    str | None,
    typer.Option(
        metavar="NAME:SHARE[:PRIORITY],...", help="who sends how much of it, reported by tenant"
    ),
]
Priority = Annotated[
    int | None, typer.Option(metavar="N", min=0, max=9, help="of tenants that give none")
]
VllmPython = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="a Python that has vLLM, if this one has none"),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="write the JSON of the last line here")
]


def bench(
    config: EngineConfig,
    target: BenchTarget = None,
    streams: Streams = STREAMS,  # type: ignore[assignment]  # typer copies it into a list
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 128,
    peer: Peers = (),  # type: ignore[assignment]
    peer_streams: PeerStreams = PEER_STREAMS,  # type: ignore[assignment]
    vllm_python: VllmPython = None,
    tenants: Tenants = None,
    priority: Priority = None,
    json: JsonFile = None,
) -> None:
    """Measure tokens/s and latency over real gRPC streams; the last line is JSON."""
    from millrace.perf.bench import Plan, run
    from millrace.perf.loadgen.tenants import FORM, parse_tenants

    try:
        senders = parse_tenants(tenants, priority)
    except ValueError as error:
        raise InvalidRequest(f"tenants: {error}", "tenants", FORM) from error
    plan = Plan(
        levels=tuple(streams),
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        peers=tuple(name.value for name in peer),
        seed=config.seed or 0,
        peer_streams=tuple(peer_streams),
        tenants=senders,
        vllm_python=vllm_python or sys.executable,
    )
    run(plan, config, target, json)
