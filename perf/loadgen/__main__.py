"""`python -m millrace.perf.loadgen`: load a server and print what it did."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import grpc
import typer

from millrace.perf.loadgen.drive import Run, closed_loop, open_loop
from millrace.perf.loadgen.report import summarize
from millrace.perf.loadgen.tenants import (
    Tenant,
    assign,
    by_tenant,
    parse_tenants,
    tenant_lines,
)
from millrace.perf.loadgen.transport import ConnectSender, GenerateSender, Sender
from millrace.perf.loadgen.workload import poisson_arrivals, random_requests
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceStub


class Mode(StrEnum):
    """How requests travel."""

    generate = "generate"
    connect = "connect"


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What to do to which server."""

    target: str
    requests: int
    concurrency: int
    rate: float | None  # of the open loop, requests a second; None: closed loop
    mode: Mode
    prompt_tokens: int
    output_tokens: int
    seed: int
    tenants: tuple[Tenant, ...] = ()  # who sends; none: nobody by name


async def run_load(load: Load) -> Run:
    """Draw the requests, send them, return what came of them."""
    async with grpc.aio.insecure_channel(load.target) as channel:
        inference = InferenceStub(channel)  # type: ignore[no-untyped-call]
        model = await inference.GetModel(pb.GetModelRequest(), wait_for_ready=True)
        requests = random_requests(
            load.requests, load.prompt_tokens, load.output_tokens, model.vocab_size, [load.seed]
        )
        assign(requests, load.tenants)
        connect = load.mode is Mode.connect
        sender: Sender = ConnectSender(inference) if connect else GenerateSender(inference)
        if load.rate is None:
            run = await closed_loop(sender, requests, load.concurrency)
        else:
            arrivals_s = poisson_arrivals(load.requests, load.rate, load.seed)
            run = await open_loop(sender, requests, arrivals_s)
        await sender.close()
        return run


def main(
    target: Annotated[str, typer.Option(metavar="HOST:PORT")] = "127.0.0.1:50051",
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="how many in all")] = 64,
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, help="closed loop: streams at a time")
    ] = 16,
    rate: Annotated[
        float | None,
        typer.Option(metavar="PER-SECOND", min=0.001, help="open loop: Poisson arrivals instead"),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="a call each, or one stream for all")] = Mode.generate,
    prompt_tokens: Annotated[int, typer.Option(metavar="TOKENS", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(metavar="TOKENS", min=1)] = 128,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="of prompts and arrivals")] = 0,
    tenants: Annotated[
        str | None, typer.Option(metavar="NAME:SHARE[:PRIORITY],...", help="who sends how much")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=9, help="of those that give none")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every request's times here")
    ] = None,
) -> None:
    """Load a server; exit code 1 unless every request succeeded."""
    try:
        senders = parse_tenants(tenants, priority)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tenants") from error
    sizes = (prompt_tokens, output_tokens)
    load = Load(target, requests, concurrency, rate, mode, *sizes, seed, senders)
    run = asyncio.run(run_load(load))
    summary, shares = summarize(run), by_tenant(run)
    print("\n".join([*summary.lines(), *tenant_lines(shares)]))
    if json_file is not None:
        rows = [record.row(run.start_s) for record in run.records]
        content = {"load": dataclasses.asdict(load), "summary": dataclasses.asdict(summary)}
        content["tenants"] = {name: dataclasses.asdict(share) for name, share in shares.items()}
        json_file.write_text(json.dumps(content | {"requests": rows}))
    raise typer.Exit(1 if summary.failures else 0)


if __name__ == "__main__":
    typer.run(main)
