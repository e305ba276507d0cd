"""SPMTokenizer: a sentencepiece model, from a tokenizer.model file or built from a GGUF vocabulary.

Sentencepiece itself never produces control tokens from text, so their spellings are cut out first.
As in transformers (legacy=False) only the start of the text gets sentencepiece's dummy space, not
what follows a control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from millrace.engine.errors import ModelError, UnsupportedModel
from millrace.engine.text.model_files import (
    MAX_TOKENIZER_BYTES,
    ModelFiles,
    SpecialTokens,
    read_bounded,
    read_json,
)
from millrace.engine.text.pieces import SPACE_SYMBOL, byte_token
from millrace.engine.text.spm_model import without_dummy_prefix
from millrace.engine.text.vocabulary import MAX_VOCAB_SIZE, Tokenizer, Vocabulary

MAX_ADDED_TOKEN_CHARS = 128  # one level of the pattern's nesting each


class SPMTokenizer(Tokenizer):
    """A sentencepiece model behind the Tokenizer interface."""

    def __init__(
        self, model: bytes, special: SpecialTokens, added: Mapping[str, int] | None = None
    ) -> None:
        """`model` is a serialised ModelProto; `added` are tokens, {spelling: id}, besides its own.

        Added and control tokens are found in the text before sentencepiece sees it. Raises
        ModelError if sentencepiece refuses the model, UnsupportedModel if it puts the space that
        marks a word's start at its end.
        """
        self._start = processor(model)
        self._rest = processor(without_dummy_prefix(model))
        vocabulary = _vocabulary(self._start, special, added or {})
        self._add_bos = special.add_bos is not False
        control_ids = [i for i in vocabulary.special_ids if i < self._start.vocab_size()]
        controls = dict(zip(self._start.IdToPiece(control_ids), control_ids, strict=True))
        self._added_ids = {**controls, **(added or {})}
        self._added = _any_of(self._added_ids)
        self._added_plain = _any_of(
            s for s, i in self._added_ids.items() if i not in vocabulary.special_ids
        )
        super().__init__(vocabulary)

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        add_bos = add_special and self._add_bos and self.bos_id is not None
        ids: list[Any] = [self.bos_id] if add_bos else []
        end = 0
        for match in (self._added if parse_special else self._added_plain).finditer(text):
            ids += self._fragment(text, end, match.start())
            ids.append(self._added_ids[match[0]])
            end = match.end()
        return ids + self._fragment(text, end, len(text))

    def _fragment(self, text: str, start: int, end: int) -> list[int]:
        if start == end:
            return []
        processor = self._rest if start else self._start
        ids: list[int] = processor.EncodeAsIds(text[start:end])
        return ids


def load_spm_tokenizer(path: Path, files: ModelFiles) -> SPMTokenizer:
    """The tokenizer in `path`, a tokenizer.model, with the tokens that the folder's files add.

    Raises ModelError if the file is not a sentencepiece model or an added token is malformed.
    """
    model = read_bounded(path, MAX_TOKENIZER_BYTES)
    spellings = _spellings(processor(model))
    added, control_ids = _added_tokens(path.parent, files)
    ids = {spelling: token_id for token_id, spelling in enumerate(spellings)} | added
    named = files.special_tokens(ids.get)
    special = SpecialTokens(
        bos_id=named.bos_id if named.bos_id is not None else ids.get("<s>"),
        eos_ids=named.eos_ids or frozenset({ids["</s>"]} if "</s>" in ids else ()),
        control_ids=named.control_ids | control_ids,
        add_bos=named.add_bos,
    )
    return SPMTokenizer(model, special, added)


def _added_tokens(folder: Path, files: ModelFiles) -> tuple[dict[str, int], frozenset[int]]:
    """({spelling: id}, ids of control tokens) of added_tokens.json and tokenizer_config.json."""
    added: dict[str, int] = dict(read_json(folder / "added_tokens.json"))
    control_ids: set[int] = set()
    entries = files.tokenizer_config.get("added_tokens_decoder", {})
    try:
        for key, entry in entries.items():
            added[entry["content"]] = int(key)
            if entry.get("special", False):
                control_ids.add(int(key))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{folder}/tokenizer_config.json: added_tokens_decoder is malformed"
        raise ModelError(message) from error
    if not all(type(token_id) is int for token_id in added.values()):
        raise ModelError(f"{folder}/added_tokens.json: an id is not an integer")
    return added, frozenset(control_ids)


def processor(model: bytes) -> SentencePieceProcessor:
    """Raises ModelError with sentencepiece's own reason if `model` is not one of its models."""
    if not model:
        raise ModelError("tokenizer: not a sentencepiece model: it is empty")
    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"tokenizer: not a sentencepiece model: {error}") from error


def _spellings(model: SentencePieceProcessor) -> list[str]:
    spellings: list[str] = model.IdToPiece(list(range(model.vocab_size())))
    return spellings


def _vocabulary(
    model: SentencePieceProcessor, special: SpecialTokens, added: Mapping[str, int]
) -> Vocabulary:
    normalized = model.Normalize("a")
    if normalized.endswith(SPACE_SYMBOL):
        raise UnsupportedModel("tokenizer: treat_whitespace_as_suffix is not supported")
    size = max([model.vocab_size() - 1, *added.values()]) + 1
    if size > MAX_VOCAB_SIZE or min(added.values(), default=0) < 0:
        raise ModelError(f"tokenizer: token ids must be in [0, {MAX_VOCAB_SIZE})")
    own = range(model.vocab_size())
    control_ids = {i for i in own if model.IsControl(i) or model.IsUnknown(i)}
    pieces = [b""] * size
    for token_id, spelling in zip(own, _spellings(model), strict=True):
        byte = byte_token(spelling) if model.IsByte(token_id) else None
        shown = spelling if token_id in control_ids else spelling.replace(SPACE_SYMBOL, " ")
        pieces[token_id] = shown.encode() if byte is None else byte
    for spelling, token_id in added.items():
        pieces[token_id] = spelling.encode()
    return Vocabulary(
        pieces=tuple(pieces),
        special_ids=special.control_ids | control_ids,
        bos_id=special.bos_id,
        eos_ids=special.eos_ids,
        strips_leading_space=normalized.startswith(SPACE_SYMBOL),
    )


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of `spellings`, factored by common prefix into a trie.

    A plain alternation would try each of a thousand control tokens wherever a text has their first
    character; a trie takes one step a character.
    """
    trie: dict[str, Any] = {}
    for spelling in spellings:
        if not 0 < len(spelling) <= MAX_ADDED_TOKEN_CHARS:
            limit = f"1 to {MAX_ADDED_TOKEN_CHARS} characters"
            raise ModelError(f"tokenizer: added token {spelling[:40]!r}...: expected {limit}")
        node = trie
        for char in spelling:
            node = node.setdefault(char, {})
        node[""] = {}  # a spelling ends here
    return re.compile(_trie_pattern(trie) if trie else "(?!)")  # (?!) never matches


def _trie_pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(char) + _trie_pattern(child) for char, child in node.items() if char]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{pattern})?" if "" in node else pattern
