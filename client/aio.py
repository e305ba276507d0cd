"""AsyncClient: for asyncio. sync.py is the same for threads and scripts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from millrace.client.errors import of_rpc
from millrace.client.request import CHANNEL_OPTIONS, Answer, ChatTurn, Options, generate_request
from millrace.v1 import inference_pb2 as pb
from millrace.v1.admin_pb2_grpc import AdminStub
from millrace.v1.inference_pb2_grpc import InferenceStub


class AsyncClient:
    """One channel to one server, for the event loop that it was made on."""

    def __init__(
        self, target: str = "localhost:50051", channel: grpc.aio.Channel | None = None
    ) -> None:
        """`target` is host:port, without TLS; pass a `channel` for anything else."""
        self._channel = channel or grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.inference = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self.admin = AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncStream:
        """Start generating from text or token ids; iterate over the result for the new text."""
        return AsyncStream(self.inference.Generate(generate_request(prompt, options)))

    def chat(self, messages: Iterable[ChatTurn], **options: Unpack[Options]) -> AsyncStream:
        """Start the assistant's answer to (role, content) messages."""
        return AsyncStream(self.inference.Generate(generate_request(messages, options)))

    def connect(self) -> AsyncConnection:
        """Open a stream for many requests at once."""
        return AsyncConnection(self.inference)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncStream:
    """The new text of one request, piece by piece; `answer` holds what they add up to."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.answer = Answer()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield text as it is generated; raises CallFailed. `cancel` ends the request early."""
        try:
            async for response in self._call:
                if text := self.answer.take(response):
                    yield text
        except grpc.aio.AioRpcError as error:
            raise of_rpc(error) from None
        finally:
            self._call.cancel()

    async def read(self) -> str:
        """Wait for the end and return the whole text."""
        async for _ in self:
            pass
        return self.answer.text

    def cancel(self) -> None:
        self._call.cancel()


class AsyncConnection:
    """One Connect stream: submit and cancel from any task, iterate over the results in one."""

    def __init__(self, inference: InferenceStub) -> None:
        self._ids = itertools.count()
        self._call = inference.Connect()
        self._writing = asyncio.Lock()  # a call takes one message at a time

    async def submit(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> str:
        """Submit a request and return its id, which is made up where none is given."""
        request = generate_request(prompt, options)
        request.request_id = request.request_id or f"request-{next(self._ids)}"
        await self._write(pb.ConnectRequest(submit=request))
        return request.request_id

    async def cancel(self, request_id: str) -> None:
        cancel = pb.CancelRequest(request_id=request_id)
        await self._write(pb.ConnectRequest(cancel=cancel))

    async def _write(self, message: pb.ConnectRequest) -> None:
        async with self._writing:
            await self._call.write(message)

    async def done(self) -> None:
        """Say that no more requests will come: the results end with those that are live."""
        await self._call.done_writing()

    async def __aiter__(self) -> AsyncIterator[pb.ConnectResult]:
        """Yield each request's results as they come; raises CallFailed if the stream breaks.

        A result with `failure` set is the last of its request; `errors.of_failure` turns it into an
        exception. Leaving the loop cancels everything.
        """
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                for result in response.results:
                    yield result
        except grpc.aio.AioRpcError as error:
            raise of_rpc(error) from None
        finally:
            self._call.cancel()
