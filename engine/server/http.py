"""/metrics, /healthz and /readyz over a deliberately tiny HTTP/1.1: GET and HEAD, one a connection.

It reads bounded bytes for a bounded time, answers and closes, so neither garbage nor a stalled
scraper can hold more than one of a bounded number of connections. It knows nothing of the engine:
what it serves are functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from millrace.engine.errors import InvalidRequest

MAX_HEAD_BYTES = 8192  # request line and headers
READ_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    status: HTTPStatus
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"


def text_page(status: HTTPStatus, text: str = "") -> Page:
    """Return a page of one line; by default the status's own phrase."""
    return Page(status, f"{text or status.phrase}\n".encode())


class HttpServer:
    """Serves `routes`, a function a path, called on the event loop for each request."""

    def __init__(self, routes: Mapping[str, Callable[[], Page]]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port, which the system picks for 0.

        Raises InvalidRequest (field "http_port") where the address can't be taken.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=MAX_HEAD_BYTES, reuse_port=False
            )
        except (OSError, OverflowError) as error:
            raise InvalidRequest(
                f"cannot serve metrics on {host}:{port}: {error}", "http_port", "a free port"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening; answers under way go on until they are written or time out."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            is_head, page = await self._answer(reader)
            writer.write(_encode(page, is_head))
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass  # the client went away or stalled; nothing is owed
        finally:
            self._num_connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[bool, Page]:
        if self._num_connections > MAX_CONNECTIONS:
            return False, text_page(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return False, text_page(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except (asyncio.IncompleteReadError, TimeoutError):
            return False, text_page(HTTPStatus.BAD_REQUEST)
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return False, text_page(HTTPStatus.BAD_REQUEST)
        if parts[0] not in (b"GET", b"HEAD"):
            return False, text_page(HTTPStatus.METHOD_NOT_ALLOWED)
        return parts[0] == b"HEAD", self._page(parts[1])

    def _page(self, target: bytes) -> Page:
        route = self._routes.get(target.split(b"?", 1)[0].decode("latin-1"))
        if route is None:
            return text_page(HTTPStatus.NOT_FOUND)
        try:
            return route()
        except Exception:  # a defect in one page must not look like a dead server
            _log.exception("event=http_error")
            return text_page(HTTPStatus.INTERNAL_SERVER_ERROR)


def _encode(page: Page, is_head: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        "Connection: close",
    ]
    if page.status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return head if is_head else head + page.body
