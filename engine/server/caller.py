"""Caller: what a gRPC call says beside its message, for all requests that come on it.

The deadline is gRPC's own. The tenant is metadata, because that is what a proxy in front of the
server can set: it knows who has called, and the messages inside are not its business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from millrace.engine.errors import InvalidRequest

TENANT_KEY = "x-millrace-tenant"


@dataclass(frozen=True, slots=True)
class Caller:
    """Of one call, at one time."""

    timeout_s: float | None = None  # left of the call's deadline; None: it has none
    tenant: str = ""  # as the call's metadata says; "": it does not

    def tenant_of(self, field: str) -> str:
        """The tenant of a request whose own field says `field`. Raises InvalidRequest.

        The metadata wins. A field that says something else is refused rather than overruled:
        either the client believes to be someone that it is not, or the proxy is set up wrongly.
        """
        if self.tenant and field not in ("", self.tenant):
            limit = f"empty, or the call's {TENANT_KEY}, {self.tenant!r}"
            raise InvalidRequest(f"tenant must be {limit}; got {field!r}", "tenant", limit)
        return self.tenant or field


def caller_of(context: ServicerContext[Any, Any]) -> Caller:
    """Read a call's deadline and metadata.

    Raises InvalidRequest for a tenant that is given twice: a proxy which adds its own value must
    not be beaten by one that came with the call.
    """
    metadata = context.invocation_metadata() or ()
    tenants = [str(value) for key, value in metadata if key == TENANT_KEY]
    if len(tenants) > 1:
        limit = "given once"
        message = f"{TENANT_KEY} must be {limit}, got {len(tenants)} values"
        raise InvalidRequest(message, TENANT_KEY, limit)
    return Caller(context.time_remaining(), tenants[0] if tenants else "")
