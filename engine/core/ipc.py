"""Bytes between the front end and the engine core: msgpack structs over one ZeroMQ pair of sockets.

Knows the messages' types and nothing of what they mean. The socket lies in a private directory
(mode 0700), nothing is ever unpickled, and what doesn't decode as one of the structs is an error.

Neither side can be made to hold memory without bound, and they can't wait for each other in a ring:

- front end -> core: sending never waits. No high-water mark is needed, because the front end has at
  most one NewRequest and one Cancel in flight for each sequence that the core hasn't ended, and
  `AsyncEngine` bounds those.
- core -> front end: one message a step. Beyond FROM_CORE_HIGH_WATER unread ones `send` waits, which
  pauses the device until the front end reads again (or dies, which ends the core: `process.py`).
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from types import TracebackType
from typing import Self, cast

import msgspec
import zmq
import zmq.asyncio

from millrace.engine.core.messages import FromCore, ToCore
from millrace.engine.errors import EngineUnavailable

FROM_CORE_HIGH_WATER = 1024  # messages unread on either side: seconds of decoding steps
UNBOUNDED = 0  # ZeroMQ's word for no high-water mark
LAST_WORDS_MS = 2000  # for what the core sent last to leave its process


class FrontChannel:
    """The front end's side, to be used from one event loop. Makes the socket's directory."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="millrace-")  # 0700: this user alone
        self.address = f"ipc://{self._directory}/core"
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, UNBOUNDED)
        self._socket.setsockopt(zmq.RCVHWM, FROM_CORE_HIGH_WATER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:  # a TMPDIR longer than a socket's address may be, or the like
            self.close()
            message = f"no socket in {self._directory} ({error}); set TMPDIR to a short path"
            raise EngineUnavailable(message) from error

    def send(self, message: ToCore) -> None:
        """Queue one message; never waits, and reaches nobody once the core is dead."""
        # With DONTWAIT the future is done on return. Without a high-water mark, Again means that no
        # core is connected: its death is noticed elsewhere.
        data = self._encoder.encode(message)
        sent = cast("asyncio.Future[object]", self._socket.send(data, zmq.DONTWAIT))
        if not isinstance(sent.exception(), zmq.Again):
            sent.result()

    async def receive(self) -> FromCore:
        """The next message. Raises msgspec.DecodeError if it is none of FromCore."""
        return self._decoder.decode(await self._socket.recv())

    def unlink(self) -> None:
        """Remove the socket's directory; the connection that has been made stays."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Drop what is unsent and unread, and free the socket and its directory."""
        self._socket.close()
        self._context.term()
        self.unlink()


class CoreChannel:
    """The core's side: blocking, for one thread."""

    def __init__(self, address: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, FROM_CORE_HIGH_WATER)
        self._socket.setsockopt(zmq.RCVHWM, UNBOUNDED)
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS_MS)
        self._socket.connect(address)

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """Everything that has arrived, oldest first.

        Waits up to `timeout_s` seconds for a first message (0: not at all; None: for as long as it
        takes); the list is empty if none came. Raises msgspec.DecodeError for an unknown message.
        """
        if not self._socket.poll(None if timeout_s is None else round(timeout_s * 1000)):
            return []
        messages: list[ToCore] = []
        while True:
            try:
                messages.append(self._decoder.decode(self._socket.recv(zmq.DONTWAIT)))
            except zmq.Again:
                return messages

    def send(self, message: FromCore) -> None:
        """Queue one message; waits while FROM_CORE_HIGH_WATER messages are unread."""
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        """Free the socket once the last message has left, or LAST_WORDS_MS later."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
