"""The two ways in: a Generate call for each request, or all requests on one Connect stream.

`send` returns when the request has ended, in whatever way: a failure is a result here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Protocol

import grpc

from millrace.perf.loadgen.record import Record
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceStub

CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Sender(Protocol):
    """Sends requests to one server."""

    async def send(self, request: pb.GenerateRequest, record: Record) -> None:
        """Send now and fill `record` until the request has ended."""

    async def close(self) -> None:
        """No more requests will come."""


class GenerateSender:
    """One call a request."""

    def __init__(self, inference: InferenceStub) -> None:
        self._inference = inference

    async def send(self, request: pb.GenerateRequest, record: Record) -> None:
        record.sent_s = time.perf_counter()
        try:
            async for response in self._inference.Generate(request):
                record.take(response)
        except grpc.aio.AioRpcError as error:
            record.end(error.code().name, error.details() or "")
        else:
            record.end()

    async def close(self) -> None:
        """Nothing to do: each call has ended with its request."""


class ConnectSender:
    """One stream for all. Request ids must be unique."""

    def __init__(self, inference: InferenceStub) -> None:
        self._call = inference.Connect()
        self._live: dict[str, tuple[Record, asyncio.Event]] = {}
        self._writing = asyncio.Lock()  # a call takes one message at a time
        self._reading = asyncio.create_task(self._read())

    async def send(self, request: pb.GenerateRequest, record: Record) -> None:
        ended = asyncio.Event()
        self._live[request.request_id] = (record, ended)
        record.sent_s = time.perf_counter()
        # A broken stream is the reader's to report, for all that are live.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with self._writing:
                await self._call.write(pb.ConnectRequest(submit=request))
        if self._reading.done():
            self._end(request.request_id, "UNAVAILABLE", "the stream has ended")
        await ended.wait()

    async def close(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
        await self._reading

    async def _read(self) -> None:
        status, message = "UNAVAILABLE", "the stream has ended"
        try:
            async for response in self._call:
                for result in response.results:
                    self._take(result)
        except grpc.aio.AioRpcError as error:
            status, message = error.code().name, error.details() or ""
        for request_id in list(self._live):
            self._end(request_id, status, message)

    def _take(self, result: pb.ConnectResult) -> None:
        response = result.response
        live = self._live.get(response.request_id)
        if live is None:
            return
        live[0].take(response)
        if result.HasField("failure"):
            status = CODES.get(result.failure.code, "UNKNOWN")
            self._end(response.request_id, status, result.failure.message)
        elif response.HasField("summary"):
            self._end(response.request_id)

    def _end(self, request_id: str, status: str = "OK", message: str = "") -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live[0].end(status, message)
            live[1].set()
