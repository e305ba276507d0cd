"""The small JSON files of a model folder, read once, and the special tokens that they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.engine.errors import ModelError
from millrace.engine.text.vocabulary import MAX_VOCAB_SIZE

MAX_CONFIG_BYTES = 32 * 2**20  # of one JSON file beside the weights
MAX_TOKENIZER_BYTES = 256 * 2**20  # tokenizer.json or tokenizer.model
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Which ids have a meaning of their own, as the model's configuration files have it."""

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    control_ids: frozenset[int] = frozenset()  # besides those that the vocabulary itself marks
    add_bos: bool | None = None  # None: as the tokenizer's own template says


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The JSON files of one folder; {} for a file that is absent."""

    tokenizer_config: dict[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> ModelFiles:
        """Raises ModelError naming a file that is too large or not a JSON object."""
        return ModelFiles(
            tokenizer_config=read_json(folder / "tokenizer_config.json"),
            config=read_json(folder / "config.json"),
            generation_config=read_json(folder / "generation_config.json"),
        )

    def named_tokens(self) -> dict[str, str]:
        """{"bos_token": "<s>", ...} for those of NAMED_TOKENS that are set."""
        found = {name: _spelling(self.tokenizer_config.get(name)) for name in NAMED_TOKENS}
        return {name: spelling for name, spelling in found.items() if spelling is not None}

    def special_tokens(self, id_of: Callable[[str], int | None]) -> SpecialTokens:
        """The special tokens' ids; `id_of` is the vocabulary's own lookup."""
        ids = {name: id_of(spelling) for name, spelling in self.named_tokens().items()}
        eos_ids = {*self._listed_eos_ids(), ids.get("eos_token")}
        bos_id = ids.get("bos_token")
        if bos_id is None and _is_id(self.config.get("bos_token_id")):
            bos_id = self.config["bos_token_id"]
        flag = self.tokenizer_config.get("add_bos_token")
        return SpecialTokens(
            bos_id=bos_id,
            eos_ids=frozenset(i for i in eos_ids if i is not None),
            control_ids=frozenset(i for i in ids.values() if i is not None),
            add_bos=flag if isinstance(flag, bool) else None,
        )

    def _listed_eos_ids(self) -> Iterator[int]:
        for name, config in (
            ("generation_config.json", self.generation_config),
            ("config.json", self.config),
        ):
            value = config.get("eos_token_id")
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is None:
                    continue
                if not _is_id(token_id):
                    raise ModelError(f"{name}: eos_token_id {value!r}: expected one id or a list")
                yield token_id


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if there is no such file.

    Raises ModelError if it is too large, unreadable or something else than an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The whole file. Raises ModelError if it is larger than `max_bytes` or unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ModelError(f"{path}: larger than {max_bytes} bytes")
    return data


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_VOCAB_SIZE


def _spelling(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its spelling as content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
