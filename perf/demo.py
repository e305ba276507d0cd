"""`make demo`: a server, a few dozen streams through a real gRPC client, and what they cost.

Ends with exit code 1 if any request ends otherwise than it should, if a seed does not repeat its
tokens, or if the server does not leave cleanly.
"""

from __future__ import annotations

import asyncio
import sys
import time

import grpc

from millrace.engine.errors import MillraceError
from millrace.perf.demo_requests import Case, demo_cases
from millrace.perf.demo_view import STREAMING, Row, View, view_of
from millrace.perf.loadgen.drive import Run
from millrace.perf.loadgen.record import Record
from millrace.perf.loadgen.report import summarize
from millrace.perf.server_process import ServerProcess
from millrace.v1.inference_pb2_grpc import InferenceStub

METRICS = (
    "millrace_requests_total",
    "millrace_prompt_tokens_total",
    "millrace_output_tokens_total",
    "millrace_step_seconds_count",
    "millrace_prefix_hit_tokens_total",
    "millrace_kv_blocks_total",
)
FIELD_KEY = "millrace-field"


def main() -> int:
    """Run the demo; returns the process's exit code."""
    print("Starting a server (the first time, this fetches its model) ...", flush=True)
    try:
        with ServerProcess() as server:
            print(f"{server.model} is served on grpc://{server.target}\n", flush=True)
            problems = asyncio.run(_demonstrate(server.target))
            _print_metrics(server.metrics())
            code = server.stop()
            print(f"\nThe server was sent SIGTERM and left with exit code {code}.")
    except MillraceError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if code != 0:
        problems.append(f"the server's exit code is {code}")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


async def _demonstrate(target: str) -> list[str]:
    """Send everything at once, show it, print the figures; returns what went wrong."""
    cases = demo_cases()
    rows = [Row(case.label, Record(str(i), time.perf_counter())) for i, case in enumerate(cases)]
    async with grpc.aio.insecure_channel(target) as channel:
        inference = InferenceStub(channel)  # type: ignore[no-untyped-call]
        start_s = time.perf_counter()
        with view_of(rows) as view:
            found = await asyncio.gather(
                *(_send(inference, i, cases[i], row, view) for i, row in enumerate(rows))
            )
    _print_figures(Run(start_s, [row.record for row in rows]))
    problems = [problem for problem in found if problem]
    return problems + _check_seeds(cases, rows)


async def _send(inference: InferenceStub, index: int, case: Case, row: Row, view: View) -> str:
    """Follow one stream to its end; returns what was wrong with that, or nothing."""
    record = row.record
    record.intended_s = record.sent_s = time.perf_counter()
    call = inference.Generate(case.request)
    status, message, field = "OK", "", ""
    try:
        async for response in call:
            record.take(response)
            row.text += "".join(output.text for output in response.outputs if output.index == 0)
            row.state = STREAMING
            view.changed(index, row)
            if case.cancel_after is not None and record.num_tokens >= case.cancel_after:
                call.cancel()
    except grpc.aio.AioRpcError as error:
        status, message = error.code().name, error.details() or ""
        field = str(dict(error.trailing_metadata()).get(FIELD_KEY, ""))
    except asyncio.CancelledError:  # how grpc.aio tells a caller of its own cancel()
        if case.cancel_after is None:
            raise
        status = "CANCELLED"
    record.end(status, message)
    row.state, row.text = _ending(status), row.text or message
    view.changed(index, row)
    if (record.status, field) == (case.status, case.field):
        return ""
    return f"{case.label} ended with {record.status} {field} ({record.message})"


def _ending(status: str) -> str:
    return {"OK": "done", "CANCELLED": "cancelled", "INVALID_ARGUMENT": "refused"}.get(
        status, status
    )


def _check_seeds(cases: list[Case], rows: list[Row]) -> list[str]:
    """Requests that are alike and have a seed must have given the same tokens."""
    first: dict[bytes, Row] = {}
    problems = []
    for case, row in zip(cases, rows, strict=True):
        if not case.request.sampling.HasField("seed"):
            continue
        same = first.setdefault(case.request.SerializeToString(deterministic=True), row)
        if same is not row:
            if same.record.token_ids != row.record.token_ids:
                problems.append(f"{row.label} differs from {same.label}")
            else:
                print(f"{row.label!r} gave the same tokens as {same.label!r}.")
    return problems


def _print_figures(run: Run) -> None:
    summary = summarize(run)
    print(
        f"\n{summary.successful} requests, {summary.output_tokens} tokens in "
        f"{summary.duration_s:.1f} s: {summary.output_tokens_per_s:.1f} tokens/s"
    )
    print(f"{'in milliseconds':<20}{'p50':>9}{'p90':>9}{'p99':>9}")
    for name, spread in (("time to first token", summary.ttft), ("inter-token", summary.itl)):
        figures = (spread.median, spread.p90, spread.p99)
        print(f"{name:<20}" + "".join(f"{figure:9.1f}" for figure in figures))


def _print_metrics(page: str) -> None:
    print("\nFrom /metrics:")
    for line in page.splitlines():
        if line.startswith(METRICS):
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
