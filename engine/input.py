"""InputProcessor: what a caller asked for becomes what the engine core runs.

Everything that is wrong with a request and can be known without the device is found here, and is
answered by an InvalidRequest that names the field. Knows neither sockets nor asyncio, so the server
(`async_engine.py`) and the offline API (`llm.py`) share it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from millrace.engine.config import (
    MAX_PRIORITY,
    MAX_PROMPT_BYTES,
    MAX_REQUEST_ID_BYTES,
    TENANT_LIMIT,
    is_tenant,
)
from millrace.engine.core.messages import NewRequest, Ready
from millrace.engine.errors import InvalidRequest, UnsupportedModel
from millrace.engine.sampling_params import MAX_EOS_IDS, MAX_SEED, SamplingParams, validate
from millrace.engine.text.chat import ChatTemplate, Message
from millrace.engine.text.tokenizer import Tokenizer

TOKEN_BYTES = 4  # of one int32 id
MAX_SHOWN_CHARS = 80  # of a bad value, in an error


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; `add_special` puts the model's beginning-of-sequence token first."""

    text: str
    add_special: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered by the model's chat template.

    `add_generation_prompt` ends it with the header of an assistant's turn.
    """

    messages: Sequence[Message]
    add_generation_prompt: bool = True


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, as its caller states it."""

    request_id: str  # at most MAX_REQUEST_ID_BYTES
    prompt: Prompt
    params: SamplingParams
    timeout_s: float | None = None  # from arrival; the request ends with "deadline" then
    priority: int = 0  # class, 0 to MAX_PRIORITY; 0 is the most urgent
    tenant: str = ""  # whose it is; "": the nameless tenant's


class InputProcessor:
    """Checks requests and prepares them for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        model: Ready,
        seed: int | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        """`seed` fixes the seeds that are drawn for requests without one; tenants that are not in
        `tenant_weights` have weight 1.

        Raises UnsupportedModel where the model has more ends of sequence than the device's table
        has room for beside a request's own stop tokens.
        """
        if len(tokenizer.eos_ids) > MAX_EOS_IDS:
            message = f"{len(tokenizer.eos_ids)} end-of-sequence ids; at most {MAX_EOS_IDS} fit"
            raise UnsupportedModel(message)
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._model = model
        self._random = random.Random(seed)
        self._tenant_weights = tenant_weights or {}

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidRequest for what is wrong whatever the prompt's tokens are. Cheap."""
        id_bytes = len(request.request_id.encode("utf-8", errors="replace"))
        if id_bytes > MAX_REQUEST_ID_BYTES:
            _refuse("request_id", f"at most {MAX_REQUEST_ID_BYTES} bytes", f"{id_bytes} bytes")
        timeout_s = request.timeout_s
        if timeout_s is not None and not 0.0 <= timeout_s < math.inf:  # NaN too
            _refuse("timeout_s", "in [0, inf)", str(timeout_s))
        if not 0 <= request.priority <= MAX_PRIORITY:
            _refuse("priority", f"in [0, {MAX_PRIORITY}]", str(request.priority))
        if request.tenant and not is_tenant(request.tenant):
            _refuse("tenant", TENANT_LIMIT, repr(request.tenant[:MAX_SHOWN_CHARS]))
        size = prompt_bytes(request.prompt)
        if size > MAX_PROMPT_BYTES:
            _refuse(_field(request.prompt), f"at most {MAX_PROMPT_BYTES} bytes", f"{size} bytes")
        validate(request.params, self._model.vocab_size)

    def tokens(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """Render and tokenize: ids, int32 [tokens], each below the model's vocab_size.

        Blocks for as long as that takes; pure, so any thread may call it. Raises InvalidRequest for
        a prompt that is empty or can't be read, TemplateError if the model's template is broken.
        """
        field = _field(prompt)
        size = prompt_bytes(prompt)
        if size > MAX_PROMPT_BYTES:
            _refuse(field, f"at most {MAX_PROMPT_BYTES} bytes", f"{size} bytes")
        match prompt:
            case TextPrompt(text, add_special):
                ids = _token_ids(self._encode(text, add_special, field), field)
            case ChatPrompt():
                ids = _token_ids(self._encode(self.render(prompt), False, field), field)
            case TokenPrompt(given):
                ids = _token_ids(given, field)
        if ids.size == 0:
            _refuse(field, "at least one token", "an empty prompt")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._model.vocab_size:
            limit = f"token ids in [0, {self._model.vocab_size})"
            _refuse(field, limit, f"id {low if low < 0 else high}")
        return ids.astype(np.int32)

    def _encode(self, text: str, add_special: bool, field: str) -> list[int]:
        """Tokenize, unless the text's size alone says that it is beyond the context."""
        most = self._model.max_context * self._tokenizer.longest_piece
        if (size := _utf8_bytes(text)) > most:
            limit = f"at most {self._model.max_context - 1} tokens, so {most} bytes"
            _refuse(field, limit, f"{size} bytes")
        return self._tokenizer.encode(text, add_special=add_special)

    def render(self, prompt: ChatPrompt) -> str:
        """The text that the model's template makes of a conversation."""
        if self._chat_template is None:
            _refuse("messages", "only for models with a chat template", "a model without one")
        return self._chat_template.render(
            prompt.messages, add_generation_prompt=prompt.add_generation_prompt
        )

    def prepare(
        self,
        request: GenerationRequest,
        prompt_tokens: npt.NDArray[np.int32],
        first_id: int,
        arrival_s: float,
    ) -> list[NewRequest]:
        """The sequences of a request, one for each of its n samples, with ids from `first_id` on.

        The output is capped where the context ends; a prompt that leaves no room for a single token
        is refused. Raises InvalidRequest, also for all that `check` finds.
        """
        self.check(request)
        room = self._model.max_context - len(prompt_tokens)
        if room < 1:
            limit = f"at most {self._model.max_context - 1} tokens"
            _refuse(_field(request.prompt), limit, f"{len(prompt_tokens)} tokens")
        params = request.params
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        own_stops = set(params.stop_token_ids)
        stops = own_stops if params.ignore_eos else own_stops | self._tokenizer.eos_ids
        deadline_s = None if request.timeout_s is None else arrival_s + request.timeout_s
        return [
            NewRequest(
                id=first_id + i,
                prompt=prompt_tokens.astype("<i4", copy=False).tobytes(),
                params=_of_sample(params, seed, i),
                max_tokens=min(params.max_tokens or room, room),
                stop_token_ids=sorted(stops),
                arrival_s=arrival_s,
                deadline_s=deadline_s,
                leader=first_id if i > 0 else None,
                priority=request.priority,
                tenant=request.tenant,
                weight=self._tenant_weights.get(request.tenant, 1.0),
            )
            for i in range(params.n)
        ]


def prompt_bytes(prompt: Prompt) -> int:
    """How large a prompt is as it came, in bytes."""
    match prompt:
        case TextPrompt(text):
            return _utf8_bytes(text)
        case ChatPrompt(messages):
            return sum(_utf8_bytes(m.role) + _utf8_bytes(m.content) for m in messages)
        case TokenPrompt(ids):
            return len(ids) * TOKEN_BYTES


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))


def _field(prompt: Prompt) -> str:
    """The public field that holds this prompt."""
    match prompt:
        case TextPrompt():
            return "text"
        case ChatPrompt():
            return "messages"
        case TokenPrompt():
            return "token_ids"


def _token_ids(ids: Sequence[int], field: str) -> npt.NDArray[np.integer]:
    """Any sequence of integers as an array; floats, booleans and what overflows are refused."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidRequest(f"{field}: not a list of ids", field, "integers") from error
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        _refuse(field, "a flat list of integers", f"shape {array.shape} of {array.dtype}")
    return array


def _of_sample(params: SamplingParams, seed: int, i: int) -> SamplingParams:
    """The parameters of sample i as the core needs them: one seed, no stop strings.

    The prompt's logprobs are the same for all samples, so the first alone computes them.
    """
    return msgspec.structs.replace(
        params,
        n=1,
        stop=[],
        seed=(seed + i) % (MAX_SEED + 1),
        prompt_logprobs=params.prompt_logprobs if i == 0 else None,
    )


def _refuse(field: str, limit: str, got: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {limit}; got {got}", field, limit)
