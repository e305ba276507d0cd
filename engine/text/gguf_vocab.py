"""Tokenizers from a GGUF file's `tokenizer.ggml.*` metadata.

Two kinds of vocabulary: "gpt2" is byte-level BPE with its merges, "llama" a sentencepiece model
with its scores. Both are rebuilt for the library that runs the original. Key names and token types:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models

from millrace.engine.errors import ModelError, UnsupportedModel
from millrace.engine.text.hf_tokenizer import HFTokenizer
from millrace.engine.text.model_files import SpecialTokens
from millrace.engine.text.pieces import SPACE_SYMBOL
from millrace.engine.text.pretokenizers import find_pre_tokenizer
from millrace.engine.text.spm_model import Piece, PieceType, spm_model
from millrace.engine.text.spm_tokenizer import SPMTokenizer
from millrace.engine.text.vocabulary import MAX_VOCAB_SIZE, Tokenizer

PREFIX = "tokenizer.ggml."
# Control tokens that end a turn. Old files name only the end of a whole text as EOS.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GGUFVocab:
    """The metadata that every kind of vocabulary has, checked."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[PieceType]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> GGUFVocab:
        """Raises ModelError naming the key that is absent or malformed."""
        tokens = _array(metadata, "tokens", _text)
        if not 0 < len(tokens) <= MAX_VOCAB_SIZE:
            limit = f"expected 1 to {MAX_VOCAB_SIZE}"
            raise ModelError(f"{PREFIX}tokens: {len(tokens)} tokens, {limit}")
        types = [PieceType.NORMAL] * len(tokens)
        if PREFIX + "token_type" in metadata:
            types = _array(metadata, "token_type", PieceType, len(tokens))
        for token_id, token in enumerate(tokens):
            if not token:  # some files fill gaps in the ids so; llama.cpp gives them this name
                tokens[token_id], types[token_id] = f"[EMPTY_{token_id}]", PieceType.UNUSED
        if len(set(tokens)) < len(tokens):
            raise ModelError(f"{PREFIX}tokens: {_first_duplicate(tokens)!r} occurs twice")
        return cls(metadata, tokens, types)

    def of_type(self, *types: PieceType) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]

    def token_id(self, name: str) -> int | None:
        """The id under `tokenizer.ggml.<name>_token_id`, if there is one."""
        key = f"{PREFIX}{name}_token_id"
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelError(f"{key}: {value!r} is not an id in [0, {len(self.tokens)})")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.metadata.get(PREFIX + name, default))

    def special_tokens(self, add_bos: bool) -> SpecialTokens:
        """`add_bos` is what the kind of vocabulary does where the file says nothing."""
        ends = {self.token_id(name) for name in ("eos", "eot", "eom")}
        control = self.of_type(PieceType.CONTROL)
        ends |= {token_id for token_id in control if self.tokens[token_id] in TURN_ENDS}
        named = {self.token_id(name) for name in ("bos", "eos", "unknown", "padding")}
        return SpecialTokens(
            bos_id=self.token_id("bos"),
            eos_ids=frozenset(i for i in ends if i is not None),
            control_ids=frozenset(i for i in {*named, *control} if i is not None),
            add_bos=self.flag("add_bos_token", add_bos),
        )


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises UnsupportedModel naming the kind of vocabulary or the pre-tokenizer that is unknown, and
    ModelError naming the key that is malformed.
    """
    kind = metadata.get(PREFIX + "model")
    if kind == "gpt2":
        return _byte_level_bpe(GGUFVocab.read(metadata))
    if kind == "llama":
        return _sentencepiece(GGUFVocab.read(metadata))
    raise UnsupportedModel(f"{PREFIX}model: unknown vocabulary {kind!r}; supported: gpt2, llama")


def _byte_level_bpe(vocab: GGUFVocab) -> HFTokenizer:
    pre_tokenizer = find_pre_tokenizer(str(vocab.metadata.get(PREFIX + "pre", "default")))
    merges = [_merge(line) for line in _array(vocab.metadata, "merges", _text)]
    ids = {token: token_id for token_id, token in enumerate(vocab.tokens)}
    try:
        model = models.BPE(ids, merges, ignore_merges=pre_tokenizer.whole_words)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{PREFIX}merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    normalizer = pre_tokenizer.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer.splitter()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(vocab, PieceType.CONTROL))
    backend.add_tokens(_added(vocab, PieceType.USER_DEFINED))
    return HFTokenizer(backend, vocab.special_tokens(add_bos=pre_tokenizer.add_bos))


def _merge(line: str) -> tuple[str, str]:
    left, separator, right = line.partition(" ")
    if not (left and separator and right):
        raise ModelError(f"{PREFIX}merges: {line!r} is not two tokens")
    return left, right


def _added(vocab: GGUFVocab, kind: PieceType) -> list[AddedToken]:
    special = kind is PieceType.CONTROL
    spellings = (vocab.tokens[token_id] for token_id in vocab.of_type(kind))
    return [AddedToken(s, normalized=False, special=special) for s in spellings]


def _sentencepiece(vocab: GGUFVocab) -> SPMTokenizer:
    scores = _array(vocab.metadata, "scores", float, len(vocab.tokens))
    if not all(map(math.isfinite, scores)):
        raise ModelError(f"{PREFIX}scores: a score is not a finite number")
    unknown = vocab.of_type(PieceType.UNKNOWN)
    if len(unknown) != 1:
        raise ModelError(f"{PREFIX}token_type: {len(unknown)} unknown tokens, expected one")
    model = spm_model(
        map(_piece, vocab.tokens, scores, vocab.types),
        unk_id=unknown[0],
        add_dummy_prefix=vocab.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocab.flag("remove_extra_whitespaces", False),
    )
    return SPMTokenizer(model, vocab.special_tokens(add_bos=True))


def _piece(token: str, score: float, kind: PieceType) -> Piece:
    if kind is PieceType.USER_DEFINED:
        token = token.replace(" ", SPACE_SYMBOL)  # sentencepiece sees text with spaces escaped
    return Piece(token, score, kind)


def _array(
    metadata: Mapping[str, Any],
    name: str,
    convert: Callable[[Any], T],
    length: int | None = None,
) -> list[T]:
    """The array under `tokenizer.ggml.<name>`, each entry converted."""
    key = PREFIX + name
    values = metadata.get(key)
    if values is None:
        raise ModelError(f"{key}: missing")
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ModelError(f"{key}: an array is expected, not {type(values).__name__}")
    if length is not None and len(values) != length:
        raise ModelError(f"{key}: {len(values)} entries, expected {length}")
    try:
        return [convert(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ModelError(f"{key}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string is expected, not {type(value).__name__}")
    return value


def _first_duplicate(tokens: Sequence[str]) -> str:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    raise AssertionError("there is no duplicate")
