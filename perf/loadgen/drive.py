"""The two loops: closed (so many streams at a time) and open (arrivals that wait for nobody)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from millrace.perf.loadgen.record import Record
from millrace.perf.loadgen.transport import Sender
from millrace.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one measurement."""

    start_s: float  # of time.perf_counter()
    records: list[Record]

    @property
    def duration_s(self) -> float:
        """From the start to the end of the last request."""
        return max((record.ended_s for record in self.records), default=self.start_s) - self.start_s


async def closed_loop(
    sender: Sender, requests: Sequence[pb.GenerateRequest], concurrency: int
) -> Run:
    """Keep `concurrency` requests under way; each is due when the one before it has ended."""
    run = Run(time.perf_counter(), [])
    waiting = iter(requests)
    await asyncio.gather(*(_stream(sender, waiting, run) for _ in range(concurrency)))
    return run


async def _stream(sender: Sender, waiting: Iterator[pb.GenerateRequest], run: Run) -> None:
    for request in waiting:
        due_s = time.perf_counter()
        record = Record(request.request_id, intended_s=due_s, tenant=request.tenant)
        run.records.append(record)
        await sender.send(request, record)


async def open_loop(
    sender: Sender, requests: Sequence[pb.GenerateRequest], arrivals_s: Sequence[float]
) -> Run:
    """Send each request at its time, however many are under way.

    Latency counts from the time that was intended, so that a client or a server that falls behind
    shows in the figures instead of thinning out the load.
    """
    run = Run(time.perf_counter(), [])
    sending = []
    for request, arrival_s in zip(requests, arrivals_s, strict=True):
        due_s = run.start_s + arrival_s
        record = Record(request.request_id, intended_s=due_s, tenant=request.tenant)
        run.records.append(record)
        await asyncio.sleep(record.intended_s - time.perf_counter())
        sending.append(asyncio.create_task(sender.send(request, record)))
    await asyncio.gather(*sending)
    return run
