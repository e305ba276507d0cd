"""The server's life: listen, start the engine, serve, drain, leave.

Health is NOT_SERVING until the engine is ready and from the first sign of its end. SIGTERM and
SIGINT drain; a second one leaves at once. If the core dies, every live stream is told and `serve`
returns non-zero, for whoever supervises the process to start another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from millrace.engine.async_engine import AsyncEngine
from millrace.engine.config import MAX_MESSAGE_BYTES, EngineConfig
from millrace.engine.core.process import CORE_COMMAND
from millrace.engine.errors import EngineUnavailable, InvalidRequest
from millrace.engine.server.admin_service import AdminService
from millrace.engine.server.http import HttpServer, Page, text_page
from millrace.engine.server.inference_service import InferenceService
from millrace.engine.server.interceptor import ErrorInterceptor
from millrace.engine.server.metrics import Metrics
from millrace.v1 import admin_pb2, inference_pb2
from millrace.v1.admin_pb2_grpc import add_AdminServicer_to_server
from millrace.v1.inference_pb2_grpc import add_InferenceServicer_to_server

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
WHOLE_SERVER = ""  # its name in grpc.health.v1

MAX_CALLS = 16_384  # at once; beyond, RESOURCE_EXHAUSTED before any of our code runs
MAX_STREAMS_PER_CONNECTION = 8192  # a client waits beyond
MAX_METADATA_BYTES = 16 * 2**10
KEEPALIVE_MS = 30_000  # a client that vanished without a word is found after these two
KEEPALIVE_TIMEOUT_MS = 10_000
LAST_STATUS_S = 1.0  # for the last messages and statuses to reach their clients
EXIT_OK, EXIT_CORE_DIED = 0, 1

GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the traffic
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # Gateways ping idle connections and silent streams; the stock limits would hang up on them.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a server listens; the ports are the real ones where 0 was asked for."""

    host: str
    port: int
    http_port: int
    model: str

    def __str__(self) -> str:
        """The one line that says a server is ready; scripts read it."""
        grpc_url = f"grpc://{_address(self.host, self.port)}"
        metrics_url = f"http://{_address(self.host, self.http_port)}/metrics"
        return f"millrace: serving {self.model} on {grpc_url}, metrics on {metrics_url}"


async def serve(
    config: EngineConfig,
    ready: Callable[[Endpoints], None] | None = None,
    command: Sequence[str] = CORE_COMMAND,
) -> int:
    """Serve until a signal or the core's death; returns the process's exit code.

    Prints one line, and calls `ready`, once requests are taken. Needs the main thread, for its
    signals. Raises InvalidRequest (field "port" or "http_port") where it can't listen, and what
    AsyncEngine.start raises where the engine can't start.
    """
    server = Server(config, command)
    with _signals() as stop:
        try:
            await server.listen()
            endpoints = await _unless(stop.first, server.start_engine())
            if endpoints is None:
                return EXIT_OK
            print(endpoints, flush=True)
            if ready is not None:
                ready(endpoints)
            cause = await _unless(stop.first, server.engine().wait_dead())
            if cause is not None:
                _log.error("event=core_died cause=%r", cause)
                return EXIT_CORE_DIED
            _log.info("event=draining timeout_s=%s", config.drain_timeout_s)
            left = await _unless(stop.second, server.drain(config.drain_timeout_s))
            _log.info("event=drained unfinished=%s", "unknown" if left is None else left)
            return EXIT_OK
        finally:
            await server.close(0.0 if stop.second.is_set() else LAST_STATUS_S)


class Server:
    """The gRPC server, the HTTP server and, from `start_engine` on, the engine behind them."""

    def __init__(self, config: EngineConfig, command: Sequence[str] = CORE_COMMAND) -> None:
        self._config = config
        self._command = command
        self._engine: AsyncEngine | None = None
        self._metrics = Metrics(config.tenant_weights or ())
        self._health = health.aio.HealthServicer()
        self._http = HttpServer(
            {"/metrics": self._metrics_page, "/healthz": self._alive, "/readyz": self._ready}
        )
        self.port = 0  # the real ones, once it listens
        self.http_port = 0
        self._grpc = grpc.aio.server(
            interceptors=(ErrorInterceptor(self._metrics.call_ended),),
            options=GRPC_OPTIONS,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        inference = InferenceService(self.engine)
        admin = AdminService(self.engine, self.drain, config.drain_timeout_s)
        add_InferenceServicer_to_server(inference, self._grpc)  # type: ignore[no-untyped-call]
        add_AdminServicer_to_server(admin, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (INFERENCE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    def engine(self) -> AsyncEngine:
        """The engine; raises EngineUnavailable while it is starting."""
        if self._engine is None:
            raise EngineUnavailable("the engine is starting")
        return self._engine

    async def listen(self) -> None:
        """Answer health checks, and everything else with UNAVAILABLE."""
        await self._set_health(_NOT_SERVING)
        address = _address(self._config.host, self._config.port)
        try:
            self.port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidRequest(
                f"cannot serve gRPC on {address}: it is in use or not this machine's",
                "port",
                "a free port",
            ) from error
        self.http_port = await self._http.start(self._config.host, self._config.http_port)
        await self._grpc.start()
        _log.info("event=listening grpc_port=%d http_port=%d", self.port, self.http_port)

    async def start_engine(self) -> Endpoints:
        """Load the model, then take requests; raises what AsyncEngine.start raises."""
        self._engine = await AsyncEngine.start(
            self._config,
            on_stats=self._metrics.step_done,
            on_finish=self._metrics.request_finished,
            command=self._command,
        )
        model = self._engine.model
        self._metrics.model_ready(model)
        await self._set_health(_SERVING)
        _log.info("event=serving model=%s device=%s", model.model, model.device)
        return Endpoints(self._config.host, self.port, self.http_port, model.model)

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, wait for the live ones; returns how many are left."""
        await self._set_health(_NOT_SERVING)
        return await self.engine().drain(timeout_s)

    async def close(self, grace_s: float) -> None:
        """End every request with UNAVAILABLE, give statuses `grace_s` to leave, free all."""
        await self._set_health(_NOT_SERVING)
        if self._engine is not None:
            await self._engine.close()
        await self._grpc.stop(grace_s)
        await self._http.close()
        _log.info("event=stopped")

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in (WHOLE_SERVER, INFERENCE):
            await self._health.set(service, status)

    def _metrics_page(self) -> Page:
        return Page(HTTPStatus.OK, self._metrics.render(), self._metrics.content_type)

    def _alive(self) -> Page:
        """Liveness: a start or a drain that takes long is no reason to be killed."""
        if self._engine is not None and self._engine.status == "dead":
            return text_page(HTTPStatus.SERVICE_UNAVAILABLE, "dead")
        return text_page(HTTPStatus.OK, "alive")

    def _ready(self) -> Page:
        status = "starting" if self._engine is None else self._engine.status
        is_ready = status == "serving"
        return text_page(HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, status)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---------------------------------------------------------------- signals


@dataclass(frozen=True, slots=True)
class _Stop:
    """How often this process was asked to end."""

    first: asyncio.Event
    second: asyncio.Event


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Count SIGTERM and SIGINT instead of dying of them."""
    stop = _Stop(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()

    def count() -> None:
        (stop.second if stop.first.is_set() else stop.first).set()

    kinds = (signal.SIGTERM, signal.SIGINT)
    for kind in kinds:
        loop.add_signal_handler(kind, count)
    try:
        yield stop
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


async def _unless(stopped: asyncio.Event, work: Awaitable[Result]) -> Result | None:
    """Return what `work` gives, or cancel it and return None once `stopped` is set."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
