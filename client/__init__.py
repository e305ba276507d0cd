"""millrace.client: a thin typed client; grpcio and protobuf are all it needs.

    from millrace.client import Client

    with Client("localhost:50051") as client:
        for text in client.generate("Once upon a time", max_tokens=32, temperature=0):
            print(text, end="", flush=True)

`AsyncClient` is the same for asyncio. Everything that isn't here is on `client.inference` and
`client.admin`, the stubs generated from the protos.
"""

from millrace.client.aio import AsyncClient, AsyncConnection, AsyncStream
from millrace.client.errors import CallFailed
from millrace.client.request import Options
from millrace.client.sync import Client, Connection, Stream

__all__ = [
    "AsyncClient",
    "AsyncConnection",
    "AsyncStream",
    "CallFailed",
    "Client",
    "Connection",
    "Options",
    "Stream",
]
