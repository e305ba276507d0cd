"""load_chat_template: the chat template of a model on disk, and the tokens that it names.

`ChatTemplate` and `Message` are in chat_template.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.engine.errors import TemplateError
from millrace.engine.text.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, Message
from millrace.engine.text.model_files import ModelFiles, read_bounded, read_json
from millrace.engine.text.tokenizer import Location
from millrace.engine.weights.gguf_header import read_gguf_metadata

__all__ = ["ChatTemplate", "Message", "load_chat_template"]

GGUF_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def load_chat_template(location: Location) -> ChatTemplate | None:
    """The chat template of the folder or the .gguf file at `location.path`; None if it has none.

    In a folder, chat_template.jinja beats tokenizer_config.json, which beats chat_template.json.
    Raises TemplateError if it is malformed or does not compile.
    """
    path = location.path
    if path.is_file():
        return chat_template_from_gguf(read_gguf_metadata(path))
    files = ModelFiles.read(path)
    source = _folder_source(path, files)
    return None if source is None else ChatTemplate(source, **files.named_tokens())


def chat_template_from_gguf(metadata: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template in a GGUF file's metadata; None if there is none."""
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    vocabulary = metadata.get("tokenizer.ggml.tokens", ())
    tokens = {
        name: vocabulary[metadata[key]]
        for name, key in GGUF_TOKENS.items()
        if metadata.get(key) in range(len(vocabulary))
    }
    return ChatTemplate(_default_of(source), **tokens)


def _folder_source(folder: Path, files: ModelFiles) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return read_bounded(jinja, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise TemplateError(f"{jinja}: not UTF-8: {error}") from error
    source = files.tokenizer_config.get("chat_template")
    if source is None:
        source = read_json(folder / "chat_template.json").get("chat_template")
    return None if source is None else _default_of(source)


def _default_of(source: Any) -> str:
    """The template, or the one named "default" in a list of {"name", "template"}."""
    if isinstance(source, list):
        named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
        if "default" not in named:
            names = ", ".join(map(str, named))
            raise TemplateError(f'chat template: none is named "default" among: {names}')
        source = named["default"]
    if not isinstance(source, str):
        raise TemplateError(f"chat template: expected text, not {type(source).__name__}")
    return source
