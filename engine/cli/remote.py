"""RemoteModel: answers from a server, through millrace.client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import grpc

from millrace.client import CallFailed, Client, Options, Stream
from millrace.engine.cli.text_stream import TextOrChat, Usage
from millrace.engine.errors import EngineUnavailable, InvalidRequest, MillraceError, StepFailed
from millrace.engine.sampling_params import SamplingParams
from millrace.v1 import inference_pb2 as pb

MS = 1000  # milliseconds a second
CONNECT_TIMEOUT_S = 10.0


class RemoteModel:
    """The model of the server at `target`."""

    def __init__(self, target: str, priority: int = 0, tenant: str = "") -> None:
        """Ask it what it serves. Raises EngineUnavailable if it does not answer."""
        self._client = Client(target)
        self._standing = Options(priority=priority, tenant=tenant)
        try:
            request = pb.GetModelRequest()
            model = self._client.inference.GetModel(request, timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            status = error.code().name
            raise EngineUnavailable(f"no Millrace server answers at {target}: {status}") from error
        self.name = model.name

    def stream(self, prompt: TextOrChat, params: SamplingParams) -> RemoteStream:
        options = _options(params)
        options.update(self._standing)
        if isinstance(prompt, str):
            return RemoteStream(self._client.generate(prompt, **options))
        return RemoteStream(self._client.chat(prompt, **options))


class RemoteStream:
    """One answer from a server."""

    def __init__(self, stream: Stream) -> None:
        self.usage: Usage | None = None
        self._stream = stream

    def cancel(self) -> None:
        self._stream.cancel()

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._stream
        except CallFailed as error:
            if error.code is not grpc.StatusCode.CANCELLED:
                raise _engine_error(error) from error
        else:
            self.usage = _usage(self._stream)


def _options(params: SamplingParams) -> Options:
    """All that is set, whether or not it is the server's default."""
    known = set(params.__struct_fields__) & set(Options.__annotations__)
    given = {name: getattr(params, name) for name in known}
    return cast(Options, {name: value for name, value in given.items() if value not in (None, [])})


def _usage(stream: Stream) -> Usage | None:
    summary = stream.answer.summary
    if summary is None:
        return None
    return Usage(
        summary.usage.prompt_tokens,
        summary.usage.output_tokens,
        summary.timing.first_token_ms / MS,
        summary.timing.total_ms / MS,
        stream.answer.finish_reason,
    )


def _engine_error(error: CallFailed) -> MillraceError:
    """The error that the server turned into this status."""
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(error.message, error.field, error.limit)
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return EngineUnavailable(str(error))
    return StepFailed(str(error))
