"""`millrace serve`: the server, in the foreground, until a signal."""

from __future__ import annotations

import asyncio
import logging

import typer

from millrace.engine.config import EngineConfig


def serve(config: EngineConfig) -> None:
    """Serve a model over gRPC, with /metrics and probes over HTTP.

    SIGTERM or Ctrl-C drains: new requests are refused, live ones may end. A second one leaves now.
    """
    from millrace.engine.server import grpc_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    raise typer.Exit(asyncio.run(grpc_server.serve(config)))
