"""Requests from keyword arguments, and what their answers add up to: for sync.py and aio.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from google.protobuf.message import Message

from millrace.v1 import inference_pb2 as pb

MAX_MESSAGE_BYTES = 16 * 2**20  # the server's own bound
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_FINISH_PREFIX = "FINISH_REASON_"

ChatTurn = tuple[str, str]  # role and content


class Options(TypedDict, total=False):
    """What may be asked for; inference.proto has units and defaults. For `n`, use a stub."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    temperature_last: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    allowed_token_ids: Sequence[int]
    banned_token_ids: Sequence[int]
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_string: bool
    logprobs: int
    logprobs_mode: str  # the name of a LogprobsMode
    prompt_logprobs: int
    skip_special_tokens: bool
    timeout_ms: int
    priority: int
    tenant: str
    request_id: str


def generate_request(
    prompt: str | Iterable[int] | Iterable[ChatTurn], options: Options
) -> pb.GenerateRequest:
    """Return the request for a text, for token ids, or for (role, content) messages.

    Raises TypeError for an unknown option or a value of the wrong type.
    """
    known = set(Options.__annotations__)
    unknown = set(options) - known
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}")
    return pb.GenerateRequest(
        prompt=_prompt(prompt),
        sampling=pb.SamplingParams(**_of(pb.SamplingParams, options)),
        stopping=pb.Stopping(**_of(pb.Stopping, options)),
        response=pb.ResponseOptions(**_of(pb.ResponseOptions, options)),
        **_of(pb.GenerateRequest, options),
    )


def _prompt(prompt: str | Iterable[int] | Iterable[ChatTurn]) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    ids: list[int] = []
    messages: list[pb.ChatMessage] = []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
        else:
            role, content = part
            messages.append(pb.ChatMessage(role=role, content=content))
    if ids and messages:
        raise TypeError("a prompt is a text, token ids or messages, not a mixture")
    if messages:
        return pb.Prompt(messages=pb.ChatMessages(messages=messages))
    return pb.Prompt(token_ids=pb.TokenIds(ids=ids))


def _of(kind: type[Message], options: Options) -> dict[str, Any]:
    """The options that are fields of one message."""
    fields = kind.DESCRIPTOR.fields_by_name
    return {name: value for name, value in options.items() if name in fields}


@dataclass
class Answer:
    """What has come of one request so far; output 0, where there are more."""

    request_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop", "length", "cancelled" or "deadline", once it has ended
    summary: pb.Summary | None = None  # likewise

    def take(self, response: pb.GenerateResponse) -> str:
        """Add what is new; returns the new text."""
        self.request_id = response.request_id
        new = [output for output in response.outputs if output.index == 0]
        for output in new:
            self.token_ids += output.token_ids
            if output.finish_reason:
                name = pb.FinishReason.Name(output.finish_reason)
                self.finish_reason = name.removeprefix(_FINISH_PREFIX).lower()
        if response.HasField("summary"):
            self.summary = response.summary
        text = "".join(output.text for output in new)
        self.text += text
        return text
