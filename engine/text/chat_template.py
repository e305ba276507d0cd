"""ChatTemplate: messages to the prompt that a chat model was trained on.

The result equals transformers' `apply_chat_template(..., tokenize=False)`. The template runs in a
process of its own (template_process.py), bounded in time, memory and output. Messages are checked
here; whatever the user got wrong is InvalidRequest, whatever the template did is TemplateError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from millrace.engine.config import MAX_PROMPT_BYTES
from millrace.engine.errors import InvalidRequest, TemplateError
from millrace.engine.text.template_process import TemplateProcess, TemplateSetup, describe

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_BYTES = 2**20
MAX_VARIABLES_BYTES = 2 * MAX_PROMPT_BYTES  # of a request's further variables, as JSON
RENDER_CPU_S = 2.0
RENDER_MEMORY_BYTES = 2**30  # the largest prompt needs about a third


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


class ChatTemplate:
    """A compiled chat template. Threads may share it."""

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        """Compiles `source`; a token that is None is undefined in the template.

        Raises TemplateError naming the line if it does not compile or is too large.
        """
        size = len(source.encode(errors="surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"chat template: {size} bytes, at most {MAX_TEMPLATE_BYTES}")
        tokens = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
        }
        known = {name: token for name, token in tokens.items() if token is not None}
        setup = TemplateSetup(
            source=source,
            variables={"tools": None, "documents": None} | known,
            max_bytes=MAX_PROMPT_BYTES,
            memory_bytes=RENDER_MEMORY_BYTES,
            cpu_s=RENDER_CPU_S,
        )
        self._process = TemplateProcess(setup)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; `add_generation_prompt` ends it where the assistant's answer begins.

        `variables` are further names for the template to read, such as tools or enable_thinking,
        with JSON values. Raises InvalidRequest(field="messages") if the messages are malformed, the
        template refuses them or the text is too long, InvalidRequest(field="chat_template_kwargs")
        if `variables` are at fault, and TemplateError if the template fails.
        """
        _check_messages(messages)
        own: dict[str, Any] = {
            "messages": [asdict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        _check_variables(variables or {}, reserved=own)
        answer = self._process.render({**(variables or {}), **own})
        if "text" in answer:
            return str(answer["text"])
        if "refusal" in answer:
            limit = "what the chat template accepts"
            raise InvalidRequest(f"messages: {answer['refusal']}", "messages", limit)
        if "too_long" in answer:
            raise _too_long("the rendered chat")
        raise TemplateError(describe(answer))

    def close(self) -> None:
        """End the template's process; this also happens when the object goes away."""
        self._process.close()


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages: empty", "messages", "at least one message")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            limit = "role is one of " + ", ".join(ROLES)
            raise InvalidRequest(
                f"messages[{index}]: unknown role {message.role!r}; {limit}", "messages", limit
            )
    if sum(len(message.content) for message in messages) > MAX_PROMPT_BYTES:
        raise _too_long("their content")


def _check_variables(variables: Mapping[str, Any], reserved: Iterable[str]) -> None:
    field, limit = "chat_template_kwargs", f"JSON of at most {MAX_VARIABLES_BYTES} bytes"
    for name in reserved:
        if name in variables:
            raise InvalidRequest(f"{field}: {name!r} is set by the server", field, f"not {name}")
    try:
        size = len(json.dumps(variables))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: not JSON: {error}", field, limit) from error
    if size > MAX_VARIABLES_BYTES:
        raise InvalidRequest(f"{field}: {size} bytes of JSON, {limit}", field, limit)


def _too_long(what: str) -> InvalidRequest:
    limit = f"at most {MAX_PROMPT_BYTES} bytes"
    return InvalidRequest(f"messages: {what}: expected {limit}", "messages", limit)
