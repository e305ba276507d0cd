"""AsyncEngine (2 of 8): requests in, streams of text out, around one engine core.

Checks and tokenizes off the event loop, submits to the core (live_requests.py has the books and the
way back), and answers for the core's life: start, drain, death, close. Every request that `submit`
accepts ends exactly once in its outbox, whatever happens.

Before it: engine/server/inference_service.py. After it: engine/core/loop.py, behind ipc.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt

from millrace.engine.config import EngineConfig
from millrace.engine.core.messages import (
    CacheFlushed,
    FinishReason,
    FlushCache,
    FromCore,
    StepOutput,
    StepStats,
)
from millrace.engine.core.process import CORE_COMMAND, CoreProcess
from millrace.engine.errors import (
    DuplicateRequest,
    EngineUnavailable,
    MillraceError,
    Overloaded,
    RequestError,
)
from millrace.engine.input import GenerationRequest, InputProcessor, Prompt, prompt_bytes
from millrace.engine.live_requests import LiveRequests, RequestHandle
from millrace.engine.outbox import Outbox, RequestOutput
from millrace.engine.output import FinishedRequest, RequestProgress, refusal
from millrace.engine.text.chat import ChatTemplate, load_chat_template
from millrace.engine.text.tokenizer import Tokenizer, load_tokenizer
from millrace.engine.weights.locate import ModelLocation, resolve

__all__ = ["AsyncEngine", "FinishedRequest", "Outbox", "RequestHandle", "RequestOutput", "Status"]

TOKENIZER_THREADS = 2  # tokenizing must leave cores to the engine
MAX_TOKENIZING_BYTES = 64 * 2**20  # of prompts that wait for those threads, together
BACKLOG_FACTOR = 2  # times max_running + max_waiting: see _admit
STOP_TIMEOUT_S = 5.0  # for the core to leave by itself

Status = Literal["serving", "draining", "dead"]

log = logging.getLogger(__name__)


class AsyncEngine:
    """Streams from one core. All methods are for the event loop that it was made on."""

    def __init__(
        self,
        core: CoreProcess,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        config: EngineConfig,
        on_stats: Callable[[StepStats], None] | None = None,
        on_finish: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        """Takes over a core that is ready. `start` is the usual way."""
        self.model = core.ready
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stats = StepStats()  # the newest
        self.status: Status = "serving"
        self._core = core
        self._on_stats = on_stats
        self._on_finish = on_finish
        self._default_timeout_s = config.default_timeout_s
        self._max_sequences = BACKLOG_FACTOR * (core.ready.max_running + config.max_waiting)
        self._input = InputProcessor(
            tokenizer, chat_template, core.ready, config.seed, config.tenant_weights
        )
        self._live = LiveRequests(core.send, on_finish)
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._tokenizing_bytes = 0
        self._next_id = 0  # of sequences
        self._flushes: dict[int, asyncio.Future[int]] = {}
        self._num_flushes = 0
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(), name="core-listen")
        self._watching = asyncio.create_task(self._watch(), name="core-watch")

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_stats: Callable[[StepStats], None] | None = None,
        on_finish: Callable[[FinishedRequest], None] | None = None,
        command: Sequence[str] = CORE_COMMAND,
    ) -> AsyncEngine:
        """Find the model, load its text side here and start the core that loads the rest.

        `on_stats` is called for each step and `on_finish` for each request, on the event loop.
        Raises ModelError if the model's files are at fault, EngineUnavailable with the core's own
        message if it can't start.
        """
        location = await asyncio.to_thread(resolve, config.model, config.revision)
        tokenizer, chat_template = await asyncio.to_thread(_load_text, location)
        resolved = dataclasses.replace(  # the core must not look for the model again
            config, model=str(location.path), served_name=config.served_name or location.name
        )
        core = await CoreProcess.start(resolved, command)
        return cls(core, tokenizer, chat_template, config, on_stats, on_finish)

    # ------------------------------------------------------------ requests

    async def submit(self, request: GenerationRequest, outbox: Outbox) -> RequestHandle:
        """Accept a request; its outputs will come to `outbox`, the last with a summary or an error.

        Raises InvalidRequest, DuplicateRequest (the id is live in this outbox), Overloaded or
        EngineUnavailable; nothing of it comes to the outbox then. A request that is cancelled while
        its prompt is tokenized has ended when this returns.
        """
        handle = self._open(request, outbox)
        try:
            tokens = await self._tokenize(request.prompt)
            if not handle.ended:
                self._launch(handle, request, tokens)
        except BaseException as error:
            if handle.ended and isinstance(error, MillraceError):
                return handle  # its outbox knows that it ended
            outcome = _outcome(error)
            self._live.withdraw(handle, outcome, refusal(error) if outcome == "refused" else "")
            raise
        return handle

    def cancel(self, handle: RequestHandle, reason: FinishReason = "cancelled") -> None:
        """End a request now, in whatever phase it is, with finish `reason` and what it has."""
        self._live.cancel(handle, reason)

    def _open(self, request: GenerationRequest, outbox: Outbox) -> RequestHandle:
        arrival_s = time.monotonic()
        try:
            self._admit(request, outbox)
        except MillraceError as error:
            if self._on_finish is not None:
                total_s = time.monotonic() - arrival_s
                self._on_finish(FinishedRequest("refused", total_s=total_s, refusal=refusal(error)))
            raise
        progress = RequestProgress(
            request.params, self.tokenizer, arrival_s, request.priority, request.tenant
        )
        return self._live.open(request.request_id, outbox, progress)

    def _admit(self, request: GenerationRequest, outbox: Outbox) -> None:
        """Raise unless the request may be tried. The core's admission decides on the rest."""
        if self.status != "serving":
            raise EngineUnavailable(f"the engine is {self.status}")
        if not outbox.open:
            raise EngineUnavailable("the stream of this request has ended")
        self._input.check(request)
        if outbox.is_live(request.request_id):
            message = f"request_id {request.request_id!r} belongs to a live request"
            raise DuplicateRequest(message, "request_id", "unique among live requests")
        # The core refuses earlier than this. Only if it doesn't answer any more do its ids pile up,
        # and this bounds the memory of all that is under way to it.
        if self._live.num_sequences + request.params.n > self._max_sequences:
            limit = f"at most {self._max_sequences} sequences under way"
            raise Overloaded("the engine has too many requests under way", "engine", limit)
        if self._tokenizing_bytes + prompt_bytes(request.prompt) > MAX_TOKENIZING_BYTES:
            limit = f"at most {MAX_TOKENIZING_BYTES} bytes of prompts to tokenize"
            raise Overloaded("too many prompts wait to be tokenized", "tokenizer", limit)

    async def _tokenize(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        size = prompt_bytes(prompt)
        self._tokenizing_bytes += size
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._input.tokens, prompt)
        finally:
            self._tokenizing_bytes -= size

    def _launch(
        self, handle: RequestHandle, request: GenerationRequest, tokens: npt.NDArray[np.int32]
    ) -> None:
        if request.timeout_s is None:
            request = dataclasses.replace(request, timeout_s=self._default_timeout_s)
        progress = handle.progress
        sequences = self._input.prepare(request, tokens, self._next_id, progress.arrival_s)
        self._next_id += len(sequences)
        progress.prompt_tokens = len(tokens)
        progress.seed = sequences[0].params.seed or 0
        self._live.launch(handle, sequences)

    # ------------------------------------------------------------ the core's messages and its death

    async def _listen(self) -> None:
        """Apply the core's messages. One that can't be followed is as good as the core's death."""
        try:
            while True:
                self._apply(await self._core.receive())
                await asyncio.sleep(0)  # a backlog of steps must not starve their consumers
        except Exception:
            log.exception("the engine core's messages can't be followed any more")
            self._die("sent what can't be followed")

    def _apply(self, message: FromCore) -> None:
        match message:
            case StepOutput(stats=stats):
                self._live.apply(message)
                self.stats = stats
                if self._on_stats is not None:
                    self._on_stats(stats)
            case CacheFlushed(call=call, blocks=blocks):
                answer = self._flushes.pop(call, None)
                if answer is not None and not answer.done():
                    answer.set_result(blocks)
            case _:
                raise TypeError(f"unexpected {type(message).__name__} from a running core")

    async def _watch(self) -> None:
        cause = await self._core.wait()
        self._listening.cancel()
        self._die(cause)

    def _die(self, cause: str) -> None:
        self.status = "dead"
        if not self._death.done():
            self._death.set_result(cause)
            log.error("the engine core %s; live_requests=%d", cause, len(self._live))
            self._end_all(EngineUnavailable(f"the engine core {cause}"))

    def _end_all(self, error: EngineUnavailable) -> None:
        self._live.end_all(error)
        for answer in self._flushes.values():
            if not answer.done():
                answer.set_exception(error)
        self._flushes.clear()

    # ------------------------------------------------------------ the engine's own life

    async def flush_cache(self) -> int:
        """Forget every cached prefix that no request uses; returns how many blocks these were."""
        if self.status == "dead":
            raise EngineUnavailable("the engine is dead")
        self._num_flushes += 1
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._flushes[self._num_flushes] = answer
        self._core.send(FlushCache(self._num_flushes))
        return await answer

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for the live ones; returns how many are left."""
        if self.status == "serving":
            self.status = "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._live.wait_idle(), timeout_s)
        return len(self._live)

    async def wait_dead(self) -> str:
        """Wait for the core's death, if it comes; says how it died. `close` is not a death."""
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """End what is live with EngineUnavailable, then the core, by force where it must be."""
        self.status = "dead"
        self._end_all(EngineUnavailable("the engine is shutting down"))
        for task in (self._watching, self._listening):
            task.cancel()
        await asyncio.gather(self._watching, self._listening, return_exceptions=True)
        self._pool.shutdown(wait=False)
        await self._core.stop(STOP_TIMEOUT_S)
        if self.chat_template is not None:
            await asyncio.to_thread(self.chat_template.close)


def _load_text(location: ModelLocation) -> tuple[Tokenizer, ChatTemplate | None]:
    return load_tokenizer(location), load_chat_template(location)


def _outcome(error: BaseException) -> FinishReason:
    """How a request ended that could not be launched."""
    if isinstance(error, RequestError):
        return "refused"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
