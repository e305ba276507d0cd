"""AdminService: drain, load and the prefix cache, for operators and autoscalers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from grpc.aio import ServicerContext

from millrace.engine.async_engine import AsyncEngine
from millrace.engine.server import convert
from millrace.v1 import admin_pb2 as pb
from millrace.v1.admin_pb2_grpc import AdminServicer


class AdminService(AdminServicer):
    """`drain(timeout_s)` turns health NOT_SERVING, waits, and returns how many requests are left.

    `engine` gives the engine, or raises EngineUnavailable while there is none.
    """

    def __init__(
        self,
        engine: Callable[[], AsyncEngine],
        drain: Callable[[float], Awaitable[int]],
        drain_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._drain = drain
        self._drain_timeout_s = drain_timeout_s

    async def Drain(
        self, request: pb.DrainRequest, context: ServicerContext[Any, Any]
    ) -> pb.DrainResponse:
        timeout_s = convert.drain_timeout_s(request, self._drain_timeout_s)
        return pb.DrainResponse(unfinished=await self._drain(timeout_s))

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetLoadResponse:
        engine = self._engine()
        draining = engine.status != "serving"
        return convert.load_response(engine.stats, engine.model, draining)

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: ServicerContext[Any, Any]
    ) -> pb.FlushCacheResponse:
        return pb.FlushCacheResponse(blocks=await self._engine().flush_cache())
