"""CallFailed: a gRPC status with what Millrace says beside it."""

from __future__ import annotations

from typing import Any

import grpc

from millrace.v1 import inference_pb2 as pb

_MS = 1000
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallFailed(Exception):
    """The server refused or could not finish a request.

    `field` and `limit` name what was wrong with the request, where something was; `retry_after_s`
    is set where trying again later may help.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        field: str = "",
        limit: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.field = field
        self.limit = limit
        self.retry_after_s = retry_after_s


def of_rpc(error: Any) -> CallFailed:
    """Return the error of a failed call: a grpc.Call, or a grpc.aio.AioRpcError."""
    # Iterated, as a sequence of pairs: grpc.aio.Metadata also has keys(), which differ by version.
    trailers = dict(iter(error.trailing_metadata() or ()))
    pushback_ms = trailers.get("grpc-retry-pushback-ms")
    return CallFailed(
        error.code(),
        error.details() or "",
        trailers.get("millrace-field", ""),
        trailers.get("millrace-limit", ""),
        int(pushback_ms) / _MS if pushback_ms else None,
    )


def of_failure(failure: pb.Failure) -> CallFailed:
    """Return the error of one request of a Connect stream."""
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    retry_after_s = failure.retry_after_ms / _MS if failure.retry_after_ms else None
    return CallFailed(code, failure.message, failure.field, failure.limit, retry_after_s)
