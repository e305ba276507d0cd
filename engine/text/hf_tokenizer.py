"""HFTokenizer: a tokenizer.json, or a pipeline built in memory, run by the `tokenizers` package.

Encoding is the library's. Decoding goes through our table of bytes (vocabulary.py): equal to the
library's on valid text, while on bytes that are not UTF-8 the library's byte fallback writes one
U+FFFD a byte and ours what `bytes.decode` does.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import tokenizers

from millrace.engine.errors import ModelError
from millrace.engine.text.model_files import (
    MAX_TOKENIZER_BYTES,
    ModelFiles,
    SpecialTokens,
    read_bounded,
)
from millrace.engine.text.pieces import read_piece_decoder
from millrace.engine.text.vocabulary import MAX_VOCAB_SIZE, Tokenizer, Vocabulary


class HFTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind the Tokenizer interface."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        """Takes `backend` over. Raises UnsupportedModel if its decoder is of an unknown kind."""
        backend.no_truncation()  # a tokenizer.json may carry both, from its training
        backend.no_padding()
        self._backend = backend
        self._add_bos = special.add_bos
        super().__init__(_vocabulary(backend, special))

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        backend = self._backend if parse_special else self._literal_backend
        use_template = add_special and self._add_bos is None
        # A batch of one: only this call skips the offsets, which on long texts takes half the
        # time, and holds the GIL for a tenth as long.
        encoding = backend.encode_batch_fast([text], add_special_tokens=use_template)[0]
        ids: list[int] = encoding.ids
        if add_special and self._add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        return ids

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        """The same pipeline, blind to control tokens; a copy, since the switch is the object's."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend


def load_hf_tokenizer(path: Path, files: ModelFiles) -> HFTokenizer:
    """The tokenizer in `path`, a tokenizer.json, with the special tokens that `files` name.

    Raises ModelError naming the file if it is malformed, UnsupportedModel for an unknown decoder.
    """
    data = read_bounded(path, MAX_TOKENIZER_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: {error}") from error
    return HFTokenizer(backend, files.special_tokens(backend.token_to_id))


def _vocabulary(backend: tokenizers.Tokenizer, special: SpecialTokens) -> Vocabulary:
    ids = backend.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB_SIZE:
        raise ModelError(f"tokenizer: {size} token ids, at most {MAX_VOCAB_SIZE} are supported")
    state = backend.decoder.__getstate__() if backend.decoder else b"null"
    decoder = read_piece_decoder(json.loads(state))
    pieces = [b""] * size
    for spelling, token_id in ids.items():
        pieces[token_id] = decoder.piece(spelling)
    added = backend.get_added_tokens_decoder()
    if decoder.byte_level:
        for token_id, token in added.items():
            pieces[token_id] = token.content.encode()  # spelled plainly, not in the alphabet
    control_ids = {token_id for token_id, token in added.items() if token.special}
    return Vocabulary(
        pieces=tuple(pieces),
        special_ids=special.control_ids | control_ids,
        bos_id=special.bos_id,
        eos_ids=special.eos_ids,
        strips_leading_space=decoder.strips_leading_space,
    )
