"""LiveRequests: the front end's books of what is under way, and the one way to end it.

Turns each step's message into deltas in the consumers' outboxes: one pass, no task for a request,
no await for a token. Every handle that `open` made ends exactly once: in `_end`, which puts its
summary or its error into its outbox, or in `withdraw`, whose caller has the error at hand. Knows
neither tokenizing nor processes; the core is a function that sends it a message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from millrace.engine.core.messages import (
    Cancel,
    Delta,
    FinishReason,
    NewRequest,
    StepOutput,
    ToCore,
    TokenLogprobs,
)
from millrace.engine.errors import MillraceError, RequestError, StepFailed
from millrace.engine.outbox import Outbox, RequestOutput
from millrace.engine.output import (
    FinishedRequest,
    OutputDelta,
    RequestProgress,
    failure,
    refusal,
)

log = logging.getLogger(__name__)


class RequestHandle:
    """One submitted request; equal to itself alone."""

    def __init__(
        self, books: LiveRequests, request_id: str, outbox: Outbox, progress: RequestProgress
    ) -> None:
        self.request_id = request_id
        self.outbox = outbox
        self.progress = progress
        self.first_id: int | None = None  # of its sequences in the core, once they are there
        self.ended = False  # its last output has been put into the outbox
        self._books = books

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """End it now, in whatever phase it is, with what it has; does nothing if it has ended."""
        self._books.cancel(self, reason)


class LiveRequests:
    """All requests that have not ended. Belongs to one event loop."""

    def __init__(
        self,
        send: Callable[[ToCore], None],
        on_finish: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        """`send` gives the core a message and never waits; `on_finish` hears of each end."""
        self._send = send
        self._on_finish = on_finish
        self._handles: set[RequestHandle] = set()
        # By sequence id, until the core has ended it: perhaps later than its request has.
        self._sequences: dict[int, RequestHandle] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._handles)

    @property
    def num_sequences(self) -> int:
        """Sequences that the core has not ended, and at least one for each request."""
        return max(len(self._sequences), len(self._handles))

    async def wait_idle(self) -> None:
        """Wait until every request has ended."""
        await self._idle.wait()

    # ------------------------------------------------------------ in

    def open(self, request_id: str, outbox: Outbox, progress: RequestProgress) -> RequestHandle:
        """Enter a request that is yet to be tokenized; its id must not be live in `outbox`."""
        handle = RequestHandle(self, request_id, outbox, progress)
        outbox.add(handle)
        self._handles.add(handle)
        self._idle.clear()
        return handle

    def launch(self, handle: RequestHandle, sequences: Sequence[NewRequest]) -> None:
        """Send the core a request's sequences, whose ids follow one another."""
        handle.first_id = sequences[0].id
        for sequence in sequences:
            self._sequences[sequence.id] = handle
            self._send(sequence)

    def withdraw(self, handle: RequestHandle, outcome: FinishReason, refusal: str = "") -> None:
        """Take back a request that could not be launched; its outbox hears nothing of it."""
        if not handle.ended:
            handle.ended = True
            self._forget(handle, outcome, refusal)

    # ------------------------------------------------------------ the way back

    def apply(self, step: StepOutput) -> None:
        """Pass one step's deltas on to the outboxes."""
        now_s = time.monotonic()
        stopped: list[int] = []  # ended by a stop string, which the core doesn't know of
        for delta in step.deltas:
            handle = self._sequences.get(delta.id)
            if handle is None:
                continue
            if delta.finish is not None:
                del self._sequences[delta.id]
            if not handle.ended and self._apply_delta(handle, delta, now_s):
                stopped.append(delta.id)
        if stopped:
            self._send(Cancel(stopped, "stop"))

    def _apply_delta(self, handle: RequestHandle, delta: Delta, now_s: float) -> bool:
        """Pass one delta on; True if its sequence ended here and still runs in the core."""
        error = failure(delta)
        if error is not None:
            self._fail(handle, error)
            return False
        assert handle.first_id is not None, "only what was launched has a delta"
        try:
            output = handle.progress.apply(delta.id - handle.first_id, delta, now_s)
        except Exception:  # one request's fault stays its own
            log.exception("request_id=%s: its output can't be decoded", handle.request_id)
            self._fail(handle, StepFailed("the output could not be decoded"))
            return False
        self._put(handle, [output], delta.prompt_logprobs)
        if handle.progress.finished:
            self._end(handle)
        return output.finish is not None and delta.finish is None

    def _put(
        self,
        handle: RequestHandle,
        outputs: Sequence[OutputDelta],
        prompt_logprobs: list[TokenLogprobs] | None = None,
    ) -> None:
        told = [output for output in outputs if not output.empty]
        if told or prompt_logprobs:
            output = RequestOutput(handle.request_id, told, prompt_logprobs or [])
            handle.outbox.put(handle, output)

    # ------------------------------------------------------------ ends

    def cancel(self, handle: RequestHandle, reason: FinishReason = "cancelled") -> None:
        """End a request now; the core is told, but not waited for."""
        if handle.ended:
            return
        self._cancel_in_core(handle, reason)
        self._put(handle, handle.progress.end(reason))
        self._end(handle)

    def end_all(self, error: MillraceError) -> None:
        """The core is lost: end every request with `error`."""
        for handle in list(self._handles):
            self._end(handle, error)
        self._sequences.clear()

    def _fail(self, handle: RequestHandle, error: MillraceError) -> None:
        self._cancel_in_core(handle, "cancelled")
        self._end(handle, error)

    def _end(self, handle: RequestHandle, error: MillraceError | None = None) -> None:
        handle.ended = True
        summary = handle.progress.summary(time.monotonic()) if error is None else None
        output = RequestOutput(handle.request_id, summary=summary, error=error)
        handle.outbox.put(handle, output)
        outcome: FinishReason | None = None  # the outputs tell
        if error is not None:
            outcome = "refused" if isinstance(error, RequestError) else "error"
        self._forget(handle, outcome, refusal(error) if outcome == "refused" else "")

    def _forget(
        self, handle: RequestHandle, outcome: FinishReason | None, refusal: str = ""
    ) -> None:
        handle.outbox.remove(handle)
        self._handles.discard(handle)
        if not self._handles:
            self._idle.set()
        if self._on_finish is not None:
            finished = handle.progress.finished_request(time.monotonic(), outcome, refusal)
            self._on_finish(finished)

    def _cancel_in_core(self, handle: RequestHandle, reason: FinishReason) -> None:
        """Cancel those of its sequences that run on; a stop string's Cancel is sent already."""
        if handle.first_id is None:
            return
        ids = [handle.first_id + s.index for s in handle.progress.sequences if s.finish is None]
        running = [sequence_id for sequence_id in ids if sequence_id in self._sequences]
        if running:
            self._send(Cancel(running, reason))
