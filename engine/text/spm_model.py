"""The bytes of a sentencepiece model, written from a list of pieces.

Three of the messages in sentencepiece_model.proto are all it takes, so they are written by hand: no
need for the generated module, which ties sentencepiece to one release of protobuf.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

VARINT, LENGTH_DELIMITED, FIXED32 = 0, 2, 5  # wire types
MODEL_TYPE_BPE = 2


class PieceType(IntEnum):
    """SentencePiece.Type; GGUF numbers `tokenizer.ggml.token_type` in the same way."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; its place in the list is its id."""

    spelling: str
    score: float
    type: PieceType


def spm_model(
    pieces: Iterable[Piece], unk_id: int, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> bytes:
    """A ModelProto of type BPE that falls back to bytes if there are byte pieces.

    Sentencepiece checks it on loading: the spellings must differ, one piece must be UNKNOWN, and
    the BYTE pieces must be all 256 or none.
    """
    pieces = list(pieces)
    byte_fallback = any(piece.type is PieceType.BYTE for piece in pieces)
    model = [_message(1, _sentence_piece(piece)) for piece in pieces]
    trainer = _integer(3, MODEL_TYPE_BPE) + _integer(35, byte_fallback) + _integer(40, unk_id)
    trainer += _message(45, pieces[unk_id].spelling.encode())
    normalizer = _message(1, b"identity") + _integer(3, add_dummy_prefix)
    normalizer += _integer(4, remove_extra_whitespaces)
    return b"".join([*model, _message(2, trainer), _message(3, normalizer)])


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model, but not putting a space in front of a text.

    Two messages in a row merge, field by field, with the last value of a scalar; so this appends a
    ModelProto that has but normalizer_spec.add_dummy_prefix = false.
    """
    return model + _message(3, _integer(3, 0))


def _sentence_piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | FIXED32) + struct.pack("<f", piece.score)
    return _message(1, piece.spelling.encode()) + score + _integer(3, piece.type)


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | LENGTH_DELIMITED) + _varint(len(payload)) + payload


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
