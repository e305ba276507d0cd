"""From a token's spelling in a vocabulary file to the raw bytes that it stands for.

Two spellings cover the models that Millrace runs: GPT-2's byte-level alphabet (one printable
character a byte) and sentencepiece's ("▁" for a space, "<0x0A>" for a byte).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from millrace.engine.errors import UnsupportedModel

SPACE_SYMBOL = "▁"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_NOT_A_BYTE = 0x100  # beyond Latin-1, so that encoding to it fails


def _byte_level_alphabet() -> dict[int, int]:
    """{code point: byte}, for all 256 bytes; the Latin-1 characters left out lead to _NOT_A_BYTE.

    Printable Latin-1 stands for itself and the rest for U+0100 onwards, in order: bytes_to_unicode
    in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: byte if byte in printable else _NOT_A_BYTE for byte in range(256)}
    return alphabet | {0x100 + index: byte for index, byte in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def byte_level_piece(spelling: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet; any other spelling stands for itself."""
    try:
        return spelling.translate(_BYTE_LEVEL_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return spelling.encode()


def byte_token(spelling: str) -> bytes | None:
    """The byte of a token such as "<0x0A>"; None for every other spelling."""
    match = _BYTE_TOKEN.fullmatch(spelling)
    return bytes([int(match[1], 16)]) if match else None


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """What a tokenizer.json's `decoder` does to one token, and to the first space of a text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strips_leading_space: bool = False

    def piece(self, spelling: str) -> bytes:
        """The raw bytes of the token that the vocabulary spells so."""
        if self.byte_level:
            return byte_level_piece(spelling)
        byte = byte_token(spelling) if self.byte_fallback else None
        if byte is not None:
            return byte
        for old, new in self.replacements:
            spelling = spelling.replace(old, new)
        return spelling.encode()


def read_piece_decoder(decoder: dict[str, Any] | None) -> PieceDecoder:
    """The PieceDecoder for the `decoder` object of a tokenizer.json.

    Raises UnsupportedModel naming the first step that is not of these two kinds.
    """
    steps = decoder.get("decoders", [decoder]) if decoder else [{"type": "none"}]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return PieceDecoder(byte_level=True)
    replacements: list[tuple[str, str]] = []
    kinds: list[str] = []
    for step in steps:
        kind = step["type"]
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if "Fuse" in kinds:
                pass  # after Fuse: of the whole text, not of each token
            case _:
                raise UnsupportedModel(f"tokenizer.json: decoder step {kind} is not supported")
        kinds.append(kind)
    return PieceDecoder(
        byte_fallback="ByteFallback" in kinds,
        replacements=tuple(replacements),
        strips_leading_space="Strip" in kinds,
    )
