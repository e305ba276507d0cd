"""Tokenize and Detokenize: the tokenizer over gRPC, off the event loop and without the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from millrace.engine.async_engine import AsyncEngine
from millrace.engine.errors import InvalidRequest, Overloaded
from millrace.engine.input import InputProcessor, Prompt, TokenPrompt
from millrace.engine.server import convert
from millrace.engine.text.tokenizer import Tokenizer
from millrace.v1 import inference_pb2 as pb

MAX_CALLS = 64  # at once; each may hold a prompt and its answer

Answer = TypeVar("Answer")


class TextCalls:
    """Bounded calls to the engine's tokenizer. The threads are the event loop's own few."""

    def __init__(self, engine: Callable[[], AsyncEngine]) -> None:
        self._engine = engine
        self._num_calls = 0

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Raises InvalidRequest or Overloaded, as `detokenize` does."""
        add_special = not request.HasField("add_special") or request.add_special
        prompt = convert.to_prompt(request.prompt, add_special)
        if isinstance(prompt, TokenPrompt):
            raise InvalidRequest("token_ids are tokens already", "token_ids", "text or messages")
        return await self._in_thread(_tokenize, prompt)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        if not request.token_ids:
            return pb.DetokenizeResponse()
        prompt = TokenPrompt(list(request.token_ids))
        skip_special = convert.skips_special(request)
        return await self._in_thread(_detokenize, prompt, skip_special)

    async def _in_thread(self, call: Callable[..., Answer], *args: object) -> Answer:
        engine = self._engine()
        if self._num_calls >= MAX_CALLS:
            limit = f"at most {MAX_CALLS} calls to the tokenizer at once"
            raise Overloaded("the tokenizer is busy", "tokenizer", limit)
        self._num_calls += 1
        try:
            return await asyncio.to_thread(call, _processor(engine), engine.tokenizer, *args)
        finally:
            self._num_calls -= 1


def _processor(engine: AsyncEngine) -> InputProcessor:
    return InputProcessor(engine.tokenizer, engine.chat_template, engine.model)


def _tokenize(
    processor: InputProcessor, tokenizer: Tokenizer, prompt: Prompt
) -> pb.TokenizeResponse:
    ids = processor.tokens(prompt).tolist()
    return pb.TokenizeResponse(tokens=[pb.Token(id=i, bytes=tokenizer.token_bytes(i)) for i in ids])


def _detokenize(
    processor: InputProcessor, tokenizer: Tokenizer, prompt: TokenPrompt, skip_special: bool
) -> pb.DetokenizeResponse:
    ids = processor.tokens(prompt).tolist()  # for its checks of size and range
    return pb.DetokenizeResponse(text=tokenizer.decode(ids, skip_special))
