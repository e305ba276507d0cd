"""load_chat_template: where templates are found, and which of several is taken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.errors import TemplateError
from millrace.engine.text.chat import (
    ChatTemplate,
    Message,
    chat_template_from_gguf,
    load_chat_template,
)
from millrace.engine.weights.locate import ModelLocation

HI = [Message("user", "hi")]


@dataclass
class At:
    path: Path


def load(folder: Path, **tokenizer_config: Any) -> ChatTemplate | None:
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return load_chat_template(At(folder))


def rendered(template: ChatTemplate | None) -> str:
    assert template is not None
    return template.render(HI)


def test_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(At(tmp_path)) is None
    assert load(tmp_path, bos_token="<s>") is None


def test_sources_in_order_of_precedence(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert rendered(load(tmp_path)) == "processor"
    assert rendered(load(tmp_path, chat_template="config")) == "config"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert rendered(load(tmp_path, chat_template="config")) == "own file"


def test_special_tokens_are_variables(tmp_path: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token is defined }}"
    template = load(tmp_path, chat_template=source, bos_token="<s>", eos_token={"content": "</s>"})
    assert rendered(template) == "<s>|</s>||False"


def test_default_of_several_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert rendered(load(tmp_path, chat_template=named)) == "plain"
    with pytest.raises(TemplateError, match="among: tool_use"):
        load(tmp_path, chat_template=named[:1])


@pytest.mark.parametrize("source", [5, {"a": 1}, [{"name": "default", "template": 3}]])
def test_template_of_another_type_is_refused(tmp_path: Path, source: Any) -> None:
    with pytest.raises(TemplateError, match="expected text"):
        load(tmp_path, chat_template=source)


def test_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: not UTF-8"):
        load_chat_template(At(tmp_path))


def test_gguf_metadata_has_template_and_tokens() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 7,
    }
    assert rendered(chat_template_from_gguf(metadata)) == "<s>hi", "no such token as 7"
    assert chat_template_from_gguf({}) is None


@pytest.mark.model
def test_builtin_renders_as_transformers_does(
    builtin_location: ModelLocation, builtin_reference: Any
) -> None:
    template = load_chat_template(builtin_location)
    assert template is not None
    for messages in (HI, [Message("system", "Be brief."), *HI, Message("assistant", "ok"), *HI]):
        chat = [{"role": m.role, "content": m.content} for m in messages]
        for prompt in (True, False):
            expected = builtin_reference.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(messages, prompt) == expected
