"""The tiny HTTP server: its three answers, and everything that is not a request."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

import pytest

from millrace.engine.errors import InvalidRequest
from millrace.engine.server import http
from millrace.engine.server.http import HttpServer, Page, text_page


def broken() -> Page:
    raise RuntimeError("a defect")


ROUTES: dict[str, Callable[[], Page]] = {
    "/healthz": lambda: text_page(HTTPStatus.OK, "ok"),
    "/readyz": lambda: text_page(HTTPStatus.SERVICE_UNAVAILABLE, "draining"),
    "/metrics": lambda: Page(HTTPStatus.OK, b"x 1\n" * 100_000, "text/plain; version=0.0.4"),
    "/broken": broken,
}


@asynccontextmanager
async def running() -> AsyncIterator[int]:
    server = HttpServer(ROUTES)
    port = await server.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await server.close()


async def exchange(port: int, sent: bytes, eof: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    if eof:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:  # it closed on us with our bytes unread
        return b""
    finally:
        writer.close()


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_each_path_gives_its_own_status_and_body() -> None:
    async def scenario() -> None:
        async with running() as port:
            ok = await exchange(port, get("/healthz"))
            assert ok.startswith(b"HTTP/1.1 200 OK\r\n") and ok.endswith(b"\r\n\r\nok\n")
            assert b"Content-Length: 3\r\n" in ok and b"Connection: close" in ok
            assert b"503" in (await exchange(port, get("/readyz"))).split(b"\r\n")[0]
            assert (await exchange(port, get("/metrics?x=1"))).endswith(b"x 1\n" * 100_000)
            assert b"404" in (await exchange(port, get("/"))).split(b"\r\n")[0]

    asyncio.run(scenario())


def test_head_sends_the_length_but_no_body() -> None:
    async def scenario() -> None:
        async with running() as port:
            answer = await exchange(port, get("/healthz", "HEAD"))
            assert b"Content-Length: 3" in answer and answer.endswith(b"\r\n\r\n")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get("/healthz", "POST"), b"405"),
        (b"GET /healthz\r\n\r\n", b"400"),
        (b"GET /healthz SPDY/3\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"400"),
        (bytes(range(256)), b"400"),
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", b"404"),
        (b"", b"400"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_is_answered_and_the_server_lives(sent: bytes, status: bytes) -> None:
    async def scenario() -> None:
        async with running() as port:
            answer = await exchange(port, sent, eof=True)
            assert not answer or answer.split(b" ")[1] == status
            assert b"200" in await exchange(port, get("/healthz"))

    asyncio.run(scenario())


def test_a_page_that_raises_is_a_500_without_its_text() -> None:
    async def scenario() -> None:
        async with running() as port:
            answer = await exchange(port, get("/broken"))
            assert b"500" in answer.split(b"\r\n")[0] and b"defect" not in answer

    asyncio.run(scenario())


def test_a_client_that_says_nothing_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        async with running() as port:
            answer = await exchange(port, b"GET /healthz HT")
            assert b"400" in answer.split(b"\r\n")[0]

    asyncio.run(scenario())


def test_connections_beyond_the_bound_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)

    async def scenario() -> None:
        async with running() as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert b"503" in await exchange(port, b"")
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.05)
            assert b"200" in await exchange(port, get("/healthz"))

    asyncio.run(scenario())


@pytest.mark.parametrize("port", [None, 70_000])
def test_a_port_that_cannot_be_had_names_its_setting(port: int | None) -> None:
    async def scenario() -> None:
        async with running() as taken:
            with pytest.raises(InvalidRequest) as caught:
                await HttpServer(ROUTES).start("127.0.0.1", port or taken)
            assert caught.value.field == "http_port"

    asyncio.run(scenario())
