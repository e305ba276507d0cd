"""ChatTemplate: well-known templates against transformers, hostile ones against their bounds.

templates/ has the shapes of the best-known ones, with every feature that they use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from millrace.engine.errors import InvalidRequest, TemplateError
from millrace.engine.text import chat_template
from millrace.engine.text.chat_template import ChatTemplate, Message

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (Path(__file__).parent / "templates").glob("*.jinja")
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"name": "weather", "parameters": {"city": {"type": "string", "hint": "<é> & '日'"}}}]
HI = [Message("user", "hi")]
CONVERSATIONS = {
    "one": [Message("user", " Hello, 世界 👋\n")],
    "system": [
        Message("system", "Be brief."),
        Message("user", "{{ x }} {% raw %} <|im_end|>"),
    ],
    "turns": [
        Message("user", "2+2?"),
        Message("assistant", "<think>\nsum\n</think>\n\n4"),
        Message("user", ""),
        Message("assistant", "<think>what?</think>Yes?"),
    ],
    "tool": [Message("user", "Rain?"), Message("assistant", "call"), Message("tool", '{"mm": 3}')],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def known(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatTemplate]]:
    source = TEMPLATES[request.param]
    template = ChatTemplate(source, **TOKENS)
    yield source, template
    template.close()


def reference(source: str, messages: list[Message], prompt: bool, **variables: Any) -> str:
    """What transformers renders, or the exception that its template raised."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[[asdict(message) for message in messages]],
            chat_template=source,
            add_generation_prompt=prompt,
            **{**TOKENS, **variables},
        )
    except Exception as error:
        return f"refused: {error}"
    return str(rendered[0])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "enable_thinking": False}])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_rendering_equals_transformers(
    known: tuple[str, ChatTemplate], conversation: str, variables: dict[str, Any], prompt: bool
) -> None:
    source, template = known
    messages = CONVERSATIONS[conversation]
    try:
        rendered = template.render(messages, prompt, variables)
    except InvalidRequest as error:
        rendered = str(error).replace("messages:", "refused:")
    assert rendered == reference(source, messages, prompt, **variables)


@pytest.mark.parametrize(
    ("messages", "limit"),
    [
        ([], "at least one message"),
        ([Message("root", "hi")], "role is one of system, user, assistant, tool"),
        ([Message("user", "a"), Message("user", "b")], "what the chat template accepts"),
    ],
)
def test_users_mistakes_name_the_field(messages: list[Message], limit: str) -> None:
    template = ChatTemplate(TEMPLATES["mistral"], **TOKENS)
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages)
    assert (caught.value.field, caught.value.limit) == ("messages", limit)


def test_refusal_passes_the_templates_words_on() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(TEMPLATES["mistral"], **TOKENS).render(
            [Message("user", "a"), Message("user", "b")]
        )


@pytest.mark.parametrize(
    "variables", [{"messages": []}, {"add_generation_prompt": 1}, {"x": b"bytes"}, {"x": "y" * 200}]
)
def test_malformed_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any]
) -> None:
    monkeypatch.setattr(chat_template, "MAX_VARIABLES_BYTES", 100)
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(TEMPLATES["chatml"]).render(HI, variables=variables)
    assert caught.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"line 2: TemplateSyntaxError"),
        ("a\n\n{% endfor %}", r"line 3: TemplateSyntaxError"),
        ("{{ 10 ** (10 ** 9) }}", r"not done after|more memory"),  # folded by the compiler
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", r"RecursionError|ended unexpectedly"),
        ("x" * (2**20 + 1), "at most 1048576"),
    ],
)
def test_template_that_does_not_compile_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.4)
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source)


LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "empty loops": (f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", "not done after 0.4 s"),
    "multiplied": ("{{ messages[0].content * 10**10 }}", "more memory"),
    "power": ("{{ (messages|length + 9) ** (10 ** 8) }}", "not done after|more memory"),
    "padded": ("{{ messages[0].content.center(10**10) }}", "more memory"),
    "filter": ("{{ messages[0].content|center(10**10) }}", "more memory"),
    "format": ("{{ '%10000000000d' % messages|length }}", "more memory|OverflowError|ValueError"),
    "indent": ("{{ messages|tojson(indent=10**10) }}", "more memory"),
    "doubled": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        "not done after|more memory",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: RecursionError"),
    "list": ("{{ (messages * 10**9)|length }}", "more memory"),
    "undefined": ("a\n{{ nothing.at.all }}", "line 2: UndefinedError"),
    "internals": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "namespace": ("{% set ns = namespace(_x=1) %}", "SecurityError"),
    "namespace later": ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_ends_as_an_error(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.4)
    template = ChatTemplate(source)
    with pytest.raises(TemplateError, match=message):
        template.render(HI)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_BYTES", 10_000)
    template = ChatTemplate(LOOP + "{{ messages[0].content }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="at most 10000 bytes") as caught:
        template.render(HI)
    assert caught.value.field == "messages"
    with pytest.raises(InvalidRequest, match="at most 10000 bytes"):
        template.render([Message("user", "x" * 10_001)])


def test_template_works_again_after_its_process_was_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.4)
    source = "{% if loop_forever %}" + LOOP * 2 + "{% endfor %}{% endfor %}{% endif %}ok"
    template = ChatTemplate(source)
    for _ in range(2):
        with pytest.raises(TemplateError, match="not done after"):
            template.render(HI, variables={"loop_forever": True})
        assert template.render(HI) == "ok"


def test_time_is_counted_for_each_rendering_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.4)
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}ok")
    start = time.monotonic()
    while time.monotonic() - start < 1.5:
        assert template.render(HI) == "ok"


def test_threads_get_their_own_answers() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    wrong: list[str] = []

    def ask(name: str) -> None:
        wrong.extend(n for n in [name] * 50 if template.render([Message("user", n)]) != n)

    threads = [threading.Thread(target=ask, args=(f"thread {i}" * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_process_ends_with_the_template() -> None:
    template = ChatTemplate("ok")
    process = template._process._process
    del template
    assert process.wait(timeout=5) == 0


def test_largest_prompt_fits_into_the_memory_limit() -> None:
    template = ChatTemplate(TEMPLATES["chatml"])
    content = "\0" * (chat_template.MAX_PROMPT_BYTES - 1000) + "👋"  # six bytes each as JSON
    assert len(template.render([Message("user", content)])) > len(content)
