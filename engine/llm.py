"""LLM: offline batch generation, in this process, with the names of vLLM's offline API.

    from millrace.engine import LLM, SamplingParams
    llm = LLM()                                     # the built-in model
    for output in llm.generate(["Hello"], SamplingParams(temperature=0.0, max_tokens=32)):
        print(output.outputs[0].text)

The same core, scheduler, runner and sampler as the server's, without sockets: what a prompt gives
here it gives there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.messages import Cancel, StepOutput, TokenLogprobs
from millrace.engine.errors import InvalidRequest, Overloaded, StepFailed
from millrace.engine.input import (
    ChatPrompt,
    GenerationRequest,
    InputProcessor,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from millrace.engine.output import SequenceOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.text.chat import Message, load_chat_template
from millrace.engine.text.tokenizer import load_tokenizer
from millrace.engine.weights.locate import resolve

PromptLike = str | Mapping[str, Any]
T = TypeVar("T")


@dataclass(slots=True)
class CompletionOutput:
    """One of the n outputs of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one a token, where asked for
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop token or string that ended it


@dataclass(slots=True)
class RequestOutput:
    """A prompt and what came of it."""

    request_id: str
    prompt: str | None  # None where token ids or messages were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None  # tokens 1.. of the prompt
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class _Sequence:
    """A sequence on its way: where its deltas go."""

    request: RequestOutput
    completion: CompletionOutput
    output: SequenceOutput


class LLM:
    """A model, its KV cache and its scheduler. Keyword arguments are EngineConfig's fields."""

    def __init__(self, model: str | None = None, dtype: str = "auto", **settings: Any) -> None:
        config = EngineConfig(model=model, dtype=dtype, **settings)
        location = resolve(config.model, config.revision)
        self._core, self.model = build_core(config, location)
        self._tokenizer = load_tokenizer(location)
        self._input = InputProcessor(
            self._tokenizer,
            load_chat_template(location),
            self.model,
            config.seed,
            config.tenant_weights,
        )
        self._max_waiting = config.max_waiting
        self._next_id = 0

    def get_tokenizer(self) -> Any:
        """The model's tokenizer (`encode`, `decode`)."""
        return self._tokenizer

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Complete each prompt: a string, or {"prompt_token_ids": [...]}, or {"prompt": "..."}.

        One SamplingParams, priority (0 to 9, 0 is the most urgent) and tenant for all prompts, or
        one each. Raises InvalidRequest before anything runs if any prompt or parameter cannot be
        served; outputs are in the order of the prompts.
        """
        single = isinstance(prompts, str | Mapping)
        batch: Sequence[PromptLike] = [prompts] if single else prompts  # type: ignore[list-item,assignment]
        asked = [_as_prompt(prompt) for prompt in batch]
        return self._run(asked, sampling_params, use_tqdm, priority, tenant)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, rendered by the model's chat template.

        The other arguments are those of `generate`.
        """
        conversations: Any = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        prompts: list[Prompt] = [
            ChatPrompt([Message(turn["role"], turn["content"]) for turn in conversation])
            for conversation in conversations
        ]
        return self._run(prompts, sampling_params, use_tqdm, priority, tenant)

    # ------------------------------------------------------------ running a batch

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        show_progress: bool,
        priority: int | Sequence[int],
        tenant: str | Sequence[str],
    ) -> list[RequestOutput]:
        count = len(prompts)
        each = zip(
            prompts,
            _one_each(params or SamplingParams(), SamplingParams, count, "sampling_params"),
            _one_each(priority, int, count, "priority"),
            _one_each(tenant, str, count, "tenant"),
            strict=True,
        )
        prepared = [self._prepare(*asked) for asked in each]
        results = [output for output, _ in prepared]
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not show_progress, transient=True) as progress:
            task = progress.add_task("prompts", total=len(results))
            self._drive(prepared, lambda: progress.advance(task))
        return results

    def _prepare(
        self, prompt: Prompt, params: SamplingParams, priority: int, tenant: str
    ) -> tuple[RequestOutput, list[Any]]:
        """Validate one prompt; returns its (empty) result and its sequences' NewRequests."""
        tokens = self._input.tokens(prompt)
        request = GenerationRequest(
            str(self._next_id), prompt, params, priority=priority, tenant=tenant
        )
        news = self._input.prepare(request, tokens, self._next_id, time.monotonic())
        self._next_id += len(news)
        outputs = [CompletionOutput(index) for index in range(len(news))]
        text = prompt.text if isinstance(prompt, TextPrompt) else None
        result = RequestOutput(request.request_id, text, tokens.tolist(), outputs)
        return result, [(new, params) for new in news]

    def _drive(self, prepared: list[tuple[RequestOutput, list[Any]]], done: Any) -> None:
        """Feed the core as fast as its queue takes requests, and step it until all have ended."""
        live: dict[int, _Sequence] = {}
        waiting = iter(prepared)
        try:
            while True:
                while len(live) < self._max_waiting and (pair := next(waiting, None)) is not None:
                    for sequence_id, sequence in self._submit(*pair):
                        live[sequence_id] = sequence
                if not live:
                    return
                for message in self._core.step():
                    if isinstance(message, StepOutput):
                        self._take(message, live, done)
        finally:
            if live:  # interrupted: leave the core as it was found
                self._core.handle(Cancel(list(live)))
                self._core.step()

    def _submit(self, result: RequestOutput, news: list[Any]) -> list[tuple[int, _Sequence]]:
        sequences = []
        for completion, (new, params) in zip(result.outputs, news, strict=True):
            self._core.handle(new)
            output = SequenceOutput(completion.index, params, self._tokenizer)
            sequences.append((new.id, _Sequence(result, completion, output)))
        return sequences

    def _take(self, step: StepOutput, live: dict[int, _Sequence], done: Any) -> None:
        """Hand a step's deltas to their sequences."""
        for delta in step.deltas:
            sequence = live.get(delta.id)
            if sequence is None:
                continue
            if delta.finish == "refused":
                raise Overloaded(delta.error, delta.field, delta.limit, delta.retry_after_s)
            if delta.finish == "error":
                raise StepFailed(delta.error)
            request, completion = sequence.request, sequence.completion
            new = sequence.output.apply(delta)
            completion.text += new.text
            completion.token_ids += new.token_ids
            if new.logprobs:
                completion.logprobs = [*(completion.logprobs or ()), *new.logprobs]
            if delta.prompt_logprobs and completion.index == 0:
                scored = [*(request.prompt_logprobs or ()), *delta.prompt_logprobs]
                request.prompt_logprobs = scored
            if new.finish is None:
                continue
            request.num_cached_tokens = max(request.num_cached_tokens, delta.cached_tokens)
            completion.finish_reason = new.finish
            completion.stop_reason = new.stop_string or new.stop_token_id
            if delta.finish is None:  # a stop string, which only we can see
                self._core.handle(Cancel([delta.id], "stop"))
            del live[delta.id]
            if all(output.finish_reason is not None for output in request.outputs):
                done()


def _one_each(given: T | Sequence[T], kind: type[T], count: int, field: str) -> Sequence[T]:
    """One value for all prompts, or one for each."""
    if isinstance(given, kind):
        return [given] * count
    values = cast(Sequence[T], given)
    if len(values) != count:
        message = f"{len(values)} values of {field} for {count} prompts"
        raise InvalidRequest(message, field, f"one, or {count}")
    return values


def _as_prompt(prompt: PromptLike) -> Prompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if "prompt_token_ids" in prompt:
        return TokenPrompt(prompt["prompt_token_ids"])
    if "prompt" in prompt:
        return TextPrompt(prompt["prompt"])
    limit = '"prompt" or "prompt_token_ids"'
    raise InvalidRequest(f"a prompt must hold {limit}, got {sorted(prompt)}", "prompts", limit)
