"""LocalModel: one answer at a time from a core in this process, without sockets.

The same parts as the server's: InputProcessor, EngineCore, SequenceOutput.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from millrace.engine.cli.text_stream import TextOrChat, Usage
from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import Cancel, NewRequest, StepOutput
from millrace.engine.input import ChatPrompt, GenerationRequest, InputProcessor, TextPrompt
from millrace.engine.output import OutputDelta, RequestProgress, failure
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.text.chat import Message, load_chat_template
from millrace.engine.text.tokenizer import load_tokenizer
from millrace.engine.weights.locate import resolve


class LocalModel:
    """A model in this process."""

    def __init__(self, config: EngineConfig) -> None:
        """Load it. Raises MillraceError."""
        location = resolve(config.model, config.revision)
        self._core, ready = build_core(config, location)
        self._tokenizer = load_tokenizer(location)
        template = load_chat_template(location)
        self._input = InputProcessor(self._tokenizer, template, ready, config.seed)
        self._ids = itertools.count()
        self.name = ready.model

    def stream(self, prompt: TextOrChat, params: SamplingParams) -> LocalStream:
        """Start one answer; the earlier ones must have ended."""
        if isinstance(prompt, str):
            asked: TextPrompt | ChatPrompt = TextPrompt(prompt)
        else:
            asked = ChatPrompt([Message(role, content) for role, content in prompt])
        arrival_s = time.monotonic()
        tokens = self._input.tokens(asked)
        request = GenerationRequest("cli", asked, params)
        (new,) = self._input.prepare(request, tokens, next(self._ids), arrival_s)
        progress = RequestProgress(params, self._tokenizer, arrival_s)
        progress.prompt_tokens = len(tokens)
        return LocalStream(self._core, new, progress)


class LocalStream:
    """One answer: each turn of the iteration is a step of the core."""

    def __init__(self, core: EngineCore, new: NewRequest, progress: RequestProgress) -> None:
        self.usage: Usage | None = None
        self._core = core
        self._new = new
        self._progress = progress
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def __iter__(self) -> Iterator[str]:
        self._core.handle(self._new)
        finish = None
        try:
            while finish is None and not self._cancelled:
                for output in self._step():
                    finish = output.finish or finish
                    if output.text:
                        yield output.text
        finally:  # a stop string or the caller ended it: the core does not know yet
            self._core.handle(Cancel([self._new.id]))
            self._core.step()  # publishes the end
            while not self._core.is_idle:
                self._core.step()
            self._summarize(finish or "cancelled")

    def _step(self) -> list[OutputDelta]:
        """Step the core once; returns what came of this request."""
        outputs = []
        for message in self._core.step():
            for delta in message.deltas if isinstance(message, StepOutput) else ():
                if error := failure(delta):
                    raise error
                outputs.append(self._progress.apply(0, delta, time.monotonic()))
        return outputs

    def _summarize(self, finish: str) -> None:
        summary = self._progress.summary(time.monotonic())
        self.usage = Usage(
            summary.prompt_tokens,
            summary.output_tokens,
            summary.first_token_s,
            summary.total_s,
            finish,
        )
