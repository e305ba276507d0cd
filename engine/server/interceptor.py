"""Where Millrace's calls end: bytes in that are no message, errors out as gRPC statuses.

The services raise typed errors and never look at a status; what a status says comes from the one
table in status.py. An exception that nobody foresaw becomes INTERNAL with nothing of its text:
that goes to the log, beside the request's id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc.aio import AbortError, ServerInterceptor, ServicerContext

from millrace.engine.errors import InvalidRequest, MillraceError
from millrace.engine.server.status import INTERNAL, REQUEST_ID_KEY, status_of

_PREFIX = "/millrace."  # health and reflection end their own calls

_log = logging.getLogger(__name__)

OnCall = Callable[[str, str], None]  # short method name, name of the status
Handler = Any  # grpc.RpcMethodHandler, whose types know of synchronous methods only
Behaviour = Callable[[Any, ServicerContext[Any, Any]], Awaitable[Any]]


class ErrorInterceptor(ServerInterceptor):
    """Wraps every method of Millrace's services; tells `on_call` how each call ended."""

    def __init__(self, on_call: OnCall) -> None:
        self._on_call = on_call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        name = method.rsplit("/", 1)[1]
        # No deserializer: the library would answer bad bytes with UNKNOWN and a Python exception.
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._guard(name, handler.stream_stream, _parsed_stream, handler),
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guard(name, handler.unary_stream, _parsed, handler),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guard(name, handler.unary_unary, _parsed, handler),
            response_serializer=handler.response_serializer,
        )

    def _guard(
        self,
        name: str,
        behaviour: Behaviour,
        parse: Callable[[Any, Callable[[bytes], Any]], Any],
        handler: Handler,
    ) -> Behaviour:
        async def guarded(raw: Any, context: ServicerContext[Any, Any]) -> Any:
            try:
                response = await behaviour(parse(raw, handler.request_deserializer), context)
            except AbortError:
                self._on_call(name, context.code().name)
                raise
            except asyncio.CancelledError:
                in_time = context.time_remaining() != 0
                self._on_call(name, "CANCELLED" if in_time else "DEADLINE_EXCEEDED")
                raise
            except Exception as error:
                await self._end(name, error, context)
            self._on_call(name, "OK")
            return response

        return guarded

    async def _end(self, name: str, error: Exception, context: ServicerContext[Any, Any]) -> None:
        known = tuple(context.trailing_metadata() or ())
        status = status_of(error) if isinstance(error, MillraceError) else INTERNAL
        request_id = dict(known).get(REQUEST_ID_KEY, "-")  # safe to log: it is metadata
        if status.code is grpc.StatusCode.INTERNAL:
            _log.error(
                "event=call_failed method=%s request_id=%s", name, request_id, exc_info=error
            )
        self._on_call(name, status.code.name)
        await context.abort(status.code, status.message, (*known, *status.metadata))


def _parsed(raw: bytes, deserialize: Callable[[bytes], Any]) -> Any:
    try:
        return deserialize(raw)
    except Exception as error:  # protobuf's DecodeError; the type depends on its implementation
        limit = "a protobuf message whose strings are UTF-8"
        raise InvalidRequest(f"the request must be {limit}", "request", limit) from error


async def _parsed_stream(
    raw: AsyncIterator[bytes], deserialize: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for message in raw:
        yield _parsed(message, deserialize)
