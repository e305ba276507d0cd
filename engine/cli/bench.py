"""`millrace bench`: how fast this machine serves; perf/bench.py does the measuring."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from millrace.engine.config import EngineConfig


class PeerName(StrEnum):
    """What may be measured beside Millrace."""

    transformers = "transformers"


STREAMS = (1, 16, 64)

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
Peer = Annotated[
    PeerName | None,
    typer.Option(help="measure this beside, in bf16, in turn with Millrace"),
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
    peer: Peer = None,
    json: JsonFile = None,
) -> None:
    """Measure tokens/s and latency over real gRPC streams; the last line is JSON."""
    from millrace.perf.bench import Plan, run

    plan = Plan(
        levels=tuple(streams),
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        peer=peer.value if peer is not None else None,
        seed=config.seed or 0,
    )
    run(plan, config, target, json)
