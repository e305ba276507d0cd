"""Client: for threads and scripts. aio.py is the same for asyncio."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from millrace.client.errors import of_rpc
from millrace.client.request import CHANNEL_OPTIONS, Answer, ChatTurn, Options, generate_request
from millrace.v1 import inference_pb2 as pb
from millrace.v1.admin_pb2_grpc import AdminStub
from millrace.v1.inference_pb2_grpc import InferenceStub


class Client:
    """One channel to one server. Threads may share it."""

    def __init__(
        self, target: str = "localhost:50051", channel: grpc.Channel | None = None
    ) -> None:
        """`target` is host:port, without TLS; pass a `channel` for anything else."""
        self._channel = channel or grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.inference = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self.admin = AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Stream:
        """Start generating from text or token ids; iterate over the result for the new text."""
        return Stream(self.inference.Generate(generate_request(prompt, options)))

    def chat(self, messages: Iterable[ChatTurn], **options: Unpack[Options]) -> Stream:
        """Start the assistant's answer to (role, content) messages."""
        return Stream(self.inference.Generate(generate_request(messages, options)))

    def connect(self) -> Connection:
        """Open a stream for many requests at once."""
        return Connection(self.inference)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Stream:
    """The new text of one request, piece by piece; `answer` holds what they add up to."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.answer = Answer()

    def __iter__(self) -> Iterator[str]:
        """Yield text as it is generated; leaving the loop cancels the request.

        Raises CallFailed.
        """
        try:
            for response in self._call:
                if text := self.answer.take(response):
                    yield text
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        finally:
            self._call.cancel()

    def read(self) -> str:
        """Wait for the end and return the whole text."""
        for _ in self:
            pass
        return self.answer.text

    def cancel(self) -> None:
        self._call.cancel()


class Connection:
    """One Connect stream: submit and cancel from any thread, iterate over the results in one."""

    def __init__(self, inference: InferenceStub) -> None:
        self._requests: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._call = inference.Connect(iter(self._requests.get, None))

    def submit(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> str:
        """Submit a request and return its id, which is made up where none is given."""
        request = generate_request(prompt, options)
        request.request_id = request.request_id or f"request-{next(self._ids)}"
        self._requests.put(pb.ConnectRequest(submit=request))
        return request.request_id

    def cancel(self, request_id: str) -> None:
        self._requests.put(pb.ConnectRequest(cancel=pb.CancelRequest(request_id=request_id)))

    def done(self) -> None:
        """Say that no more requests will come: the results end with those that are live."""
        self._requests.put(None)

    def __iter__(self) -> Iterator[pb.ConnectResult]:
        """Yield each request's results as they come; raises CallFailed if the stream breaks.

        A result with `failure` set is the last of its request; `errors.of_failure` turns it into an
        exception. Leaving the loop cancels everything.
        """
        try:
            for response in self._call:
                yield from response.results
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        finally:
            self._requests.put(None)  # frees the thread that gRPC reads the requests with
            self._call.cancel()
