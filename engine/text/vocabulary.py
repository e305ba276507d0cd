"""Vocabulary and Tokenizer: what a token id stands for, and text <-> ids on top of it.

Every backend (hf_tokenizer.py, spm_tokenizer.py) reduces its vocabulary to one table of raw bytes.
Decoding is then a concatenation of bytes and one UTF-8 decode, so the incremental detokenizer and
`Tokenizer.decode` cannot disagree. Knows nothing of models, requests or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from millrace.engine.errors import InvalidRequest

MAX_VOCAB_SIZE = 2**22  # ids; the largest vocabularies in use have about 2**18


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each token id stands for.

    `pieces[id]` is the token's UTF-8 bytes, perhaps a part of one character; for a control token it
    is the token's spelling, such as b"<|im_end|>". A gap in the ids holds b"".
    """

    pieces: tuple[bytes, ...]
    special_ids: frozenset[int]  # control tokens: not part of the text
    bos_id: int | None
    eos_ids: frozenset[int]  # any of these ends a generation
    strips_leading_space: bool  # a text's first space is the tokenizer's own (sentencepiece)


class Tokenizer(ABC):
    """Text to token ids and back. Immutable once built, so threads may share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size); a model may pad its logits beyond this."""
        return len(self._vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._vocabulary.eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes over this."""
        return max(map(len, self._vocabulary.pieces), default=1)

    @property
    def strips_leading_space(self) -> bool:
        """True where `decode` drops one space at the very start of the text."""
        return self._vocabulary.strips_leading_space

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special` puts the beginning-of-sequence token first where the model was trained so.
        `parse_special` turns spellings of control tokens into these tokens, which a rendered chat
        template needs; without it they are text like any other. Raises InvalidRequest if `text`
        holds a lone surrogate.
        """
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            limit = "valid Unicode"
            message = f"text holds a lone surrogate at character {error.start}"
            raise InvalidRequest(message, "text", limit) from error
        return self._encode(text, add_special, parse_special)

    @abstractmethod
    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """`encode`, on text that is known to be valid Unicode."""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD as `bytes.decode` has it."""
        text = self.text_bytes(ids, skip_special).decode("utf-8", errors="replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes that a token stands for; b"" for control tokens and for unknown ids."""
        return self.text_bytes((token_id,), skip_special=True)

    def text_bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        """The bytes of `ids` in a row, before any rule about a leading space.

        Ids outside [0, vocab_size) stand for nothing: a model whose logits are padded may draw one.
        """
        pieces, special = self._vocabulary.pieces, self._vocabulary.special_ids
        return b"".join(
            pieces[i] for i in ids if 0 <= i < len(pieces) and not (skip_special and i in special)
        )
