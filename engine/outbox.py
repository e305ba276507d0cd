"""Outbox: where the results of one consumer's requests wait until it takes them.

A consumer is one gRPC stream or the like. It never slows the engine down: what it doesn't take
merges, request by request, so an outbox holds no more than its requests' own tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from millrace.engine.core.messages import FinishReason, TokenLogprobs
from millrace.engine.errors import MillraceError
from millrace.engine.output import OutputDelta, Summary


@dataclass(slots=True)
class RequestOutput:
    """What is new about one request. `summary` or `error` is set in its last one, exactly once."""

    request_id: str
    outputs: list[OutputDelta] = field(default_factory=list)  # at most one for each index
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1..
    summary: Summary | None = None
    error: MillraceError | None = None

    def merge(self, later: RequestOutput) -> None:
        """Append what came later of the same request."""
        for output in later.outputs:
            known = next((o for o in self.outputs if o.index == output.index), None)
            if known is None:
                self.outputs.append(output)
            else:
                known.merge(output)
        self.prompt_logprobs += later.prompt_logprobs
        self.summary, self.error = later.summary, later.error


class LiveRequest(Protocol):
    """What an outbox knows of a request: hashed by identity, since an id may come again."""

    request_id: str

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """End it, which puts its last output into the outbox."""


class Outbox:
    """Results for one consumer. Belongs to one event loop; nothing but `take` waits."""

    def __init__(self) -> None:
        self._live: dict[str, LiveRequest] = {}
        self._pending: dict[LiveRequest, RequestOutput] = {}  # oldest first
        self._changed = asyncio.Event()
        self._ended = False
        self._closed = False

    async def take(self) -> list[RequestOutput]:
        """Wait until there is something, then return all of it: one RequestOutput for each request.

        A consumer that keeps up gets one list for each engine step. The list is empty after
        `close`, or after `end` once the last request's last output has been taken.
        """
        while not (self._pending or self._closed or (self._ended and not self._live)):
            self._changed.clear()
            await self._changed.wait()
        batch = list(self._pending.values())
        self._pending.clear()
        return batch

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> bool:
        """End a request, even one that is still being submitted; False if no such id is live."""
        request = self._live.get(request_id)
        if request is None:
            return False
        request.cancel(reason)
        return True

    def end(self) -> None:
        """No more requests will come: `take` ends after those that are live."""
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """The consumer has gone: cancel all its requests and drop their results."""
        self._closed = True
        for request in list(self._live.values()):
            request.cancel()
        self._pending.clear()
        self._changed.set()

    @property
    def num_live(self) -> int:
        """Requests whose last output has not been put here yet."""
        return len(self._live)

    # ------------------------------------------------------------ for the engine

    @property
    def open(self) -> bool:
        """Whether requests may still be submitted."""
        return not (self._closed or self._ended)

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def add(self, request: LiveRequest) -> None:
        """Expect the outputs of a request; its id must not be live here."""
        self._live[request.request_id] = request

    def remove(self, request: LiveRequest) -> None:
        """The request ended, or was never accepted after all."""
        self._live.pop(request.request_id, None)
        self._changed.set()

    def put(self, request: LiveRequest, output: RequestOutput) -> None:
        """Merge one output into what the consumer has not taken yet."""
        if self._closed:
            return
        pending = self._pending.get(request)
        if pending is None:
            self._pending[request] = output
            self._changed.set()
        else:
            pending.merge(output)
