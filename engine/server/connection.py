"""Connection: one Connect stream, on which many requests live at once.

One task reads, one writes. What the engine has for this stream gathers in its outbox; the writer
takes all of it at a time, so a slow client gets fewer, larger messages and slows nobody else down.
A request that can't be accepted is answered in the stream and never ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import ServicerContext

from millrace.engine.async_engine import AsyncEngine
from millrace.engine.errors import InvalidRequest, MillraceError, Overloaded, StepFailed
from millrace.engine.outbox import Outbox, RequestOutput
from millrace.engine.server import convert
from millrace.engine.server.caller import caller_of
from millrace.engine.server.status import INTERNAL, log_safe, unknown_id
from millrace.v1 import inference_pb2 as pb

MAX_LIVE_REQUESTS = 8192  # of one stream
# Submissions under way at once: enough to keep the tokenizer's threads busy. The reader waits
# beyond, so a client that doesn't read its refusals can't make them pile up.
MAX_SUBMITTING = 8

_log = logging.getLogger(__name__)


class Connection:
    """The server's side of one Connect call; lives as long as `run`."""

    def __init__(
        self,
        engine: AsyncEngine,
        requests: AsyncIterator[pb.ConnectRequest],
        context: ServicerContext[Any, Any],
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._context = context
        self._outbox = Outbox()
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._slots = asyncio.Semaphore(MAX_SUBMITTING)
        self._submitting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the client has half-closed and all its requests have ended, or it is gone.

        Raises InvalidRequest if a message can't be parsed, which ends the stream.
        """
        await self._context.send_initial_metadata(())  # the stream is up before its first result
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write_outputs())]
        try:
            await asyncio.gather(*tasks)
        finally:  # a disconnect cancels this coroutine: nobody wants the rest
            self._outbox.close()
            everything = [*tasks, *self._submitting]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._requests:
            match message.WhichOneof("action"):
                case "submit":
                    await self._start_submit(message.submit)
                case "cancel":
                    if not self._outbox.cancel(message.cancel.request_id):
                        await self._write([unknown_id(message.cancel.request_id)])
                case _:
                    limit = "submit or cancel"
                    error = InvalidRequest(f"action must be {limit}, got neither", "action", limit)
                    await self._refuse("", error)
        await asyncio.gather(*self._submitting)
        self._outbox.end()

    async def _start_submit(self, proto: pb.GenerateRequest) -> None:
        await self._slots.acquire()
        task = asyncio.create_task(self._submit(proto))
        self._submitting.add(task)
        task.add_done_callback(self._submitted)
        await asyncio.sleep(0)  # it registers the id before a cancel of it is read

    def _submitted(self, task: asyncio.Task[None]) -> None:
        self._submitting.discard(task)
        self._slots.release()

    async def _submit(self, proto: pb.GenerateRequest) -> None:
        try:
            request_id = convert.checked_request_id(proto.request_id)
            if self._outbox.num_live >= MAX_LIVE_REQUESTS:
                limit = f"at most {MAX_LIVE_REQUESTS} live requests on a stream"
                raise Overloaded("too many requests on this stream", "stream", limit)
            request = convert.generation_request(proto, request_id, caller_of(self._context))
            await self._engine.submit(request, self._outbox)
        except MillraceError as error:
            await self._refuse(proto.request_id, error)
        except Exception:  # a defect met by one request must not end its neighbours
            name = log_safe(proto.request_id)
            _log.exception("event=submit_failed method=Connect request_id=%s", name)
            await self._refuse(proto.request_id, StepFailed(INTERNAL.message))

    async def _refuse(self, request_id: str, error: MillraceError) -> None:
        await self._write([convert.connect_result(RequestOutput(request_id, error=error))])

    async def _write_outputs(self) -> None:
        while batch := await self._outbox.take():
            await self._write([convert.connect_result(output) for output in batch])

    async def _write(self, results: list[pb.ConnectResult]) -> None:
        async with self._writing:
            await self._context.write(pb.ConnectResponse(results=results))
