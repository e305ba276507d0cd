"""IncrementalDetokenizer: token ids in, text out as soon as it is final.

A token may hold a part of a character, so bytes wait here until they make up whole ones. Works on
the vocabulary's bytes alone, hence needs no window of earlier tokens to decode again.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from millrace.engine.text.vocabulary import Tokenizer


class IncrementalDetokenizer:
    """The text of one output, in deltas; O(1) a token.

    All deltas joined, `finish` included, equal `tokenizer.decode(all_ids, skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_next = tokenizer.strips_leading_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; "" while a character is still open."""
        return self._emit(self._tokenizer.text_bytes(ids, self._skip_special), final=False)

    def finish(self) -> str:
        """What was held back: U+FFFD if the output ends inside a character. Nothing may follow."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, final: bool) -> str:
        text = self._utf8.decode(data, final)
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text
