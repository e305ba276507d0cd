"""The one table from errors to gRPC statuses, and how a status names the field at fault.

The same is said twice: to people in the message, to programs in trailing metadata (or, for one
request of a Connect stream, in the fields of Failure).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import quote

import grpc

from millrace.engine.config import MAX_REQUEST_ID_BYTES
from millrace.engine.core.messages import FinishReason
from millrace.engine.errors import (
    DuplicateRequest,
    EngineUnavailable,
    InvalidRequest,
    MillraceError,
    Overloaded,
    RequestError,
    TemplateError,
)
from millrace.v1 import inference_pb2 as pb

MS = 1000  # milliseconds a second
MAX_STATUS_CHARS = 1024  # of an error's text: trailers have to fit into 8 KiB of metadata
REQUEST_ID_KEY = "x-request-id"
FIELD_KEY = "millrace-field"
LIMIT_KEY = "millrace-limit"
RETRY_KEY = "grpc-retry-pushback-ms"  # of gRPC's own retry design (gRFC A6)

_PRINTABLE = "".join(chr(i) for i in range(0x20, 0x7F) if chr(i) != "%")
_CODES: tuple[tuple[type[MillraceError], grpc.StatusCode], ...] = (  # the first that fits
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (DuplicateRequest, grpc.StatusCode.ALREADY_EXISTS),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineUnavailable, grpc.StatusCode.UNAVAILABLE),
    (TemplateError, grpc.StatusCode.FAILED_PRECONDITION),  # no other messages would help
    (MillraceError, grpc.StatusCode.INTERNAL),
)


@dataclass(frozen=True, slots=True)
class Status:
    """A gRPC status and the trailing metadata that says the same to a program."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


# What nobody foresaw: nothing of the exception leaves the server.
INTERNAL = Status(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")

# Ends of a lone request that are no errors to the engine. On Connect they are finish reasons.
FINISH_STATUS: dict[FinishReason, Status] = {
    "deadline": Status(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline has passed"),
    "cancelled": Status(grpc.StatusCode.CANCELLED, "the request was cancelled"),
}


def status_of(error: MillraceError) -> Status:
    """Return the status that an error ends a call with."""
    metadata = []
    if isinstance(error, RequestError):
        named = ((FIELD_KEY, error.field), (LIMIT_KEY, error.limit))
        metadata += [(key, log_safe(value)) for key, value in named if value]
    if isinstance(error, Overloaded):
        metadata.append((RETRY_KEY, str(_retry_after_ms(error))))
    return Status(_code(error), str(error)[:MAX_STATUS_CHARS], tuple(metadata))


def unknown_id(request_id: str) -> pb.ConnectResult:
    """Return the answer to the cancel of a request that is not live."""
    return pb.ConnectResult(
        response=pb.GenerateResponse(request_id=request_id[:MAX_REQUEST_ID_BYTES]),
        failure=pb.Failure(
            code=grpc.StatusCode.NOT_FOUND.value[0],
            message="no live request of this stream has this id",
            field="request_id",
            limit="of a live request",
        ),
    )


def failure_of(error: MillraceError) -> pb.Failure:
    """Return the same as a message, for one request of a Connect stream."""
    failure = pb.Failure(code=_code(error).value[0], message=str(error)[:MAX_STATUS_CHARS])
    if isinstance(error, RequestError):
        failure.field, failure.limit = error.field, error.limit
    if isinstance(error, Overloaded):
        failure.retry_after_ms = _retry_after_ms(error)
    return failure


def log_safe(text: str) -> str:
    """Percent-encode all but printable ASCII: fit for metadata, and no forged line in a log."""
    return quote(text, safe=_PRINTABLE)


def _code(error: MillraceError) -> grpc.StatusCode:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def _retry_after_ms(error: Overloaded) -> int:
    return max(1, math.ceil(error.retry_after_s * MS))
