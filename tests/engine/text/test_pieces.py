"""Spellings of tokens to raw bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from millrace.engine.text.pieces import byte_level_piece, byte_token


def test_byte_level_alphabet_has_every_byte_once() -> None:
    spelled = [byte_level_piece(char) for char in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(spelled) == [bytes([byte]) for byte in range(256)]


@given(st.text())
def test_byte_level_piece_undoes_the_library(text: str) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))
    assert byte_level_piece(spelled) == text.encode()


@given(st.text("Ġab é\x00\xad\u0142\u4e00"))
def test_spelling_outside_the_alphabet_stands_for_itself(spelling: str) -> None:
    expected = decoders.ByteLevel().decode([spelling])
    assert byte_level_piece(spelling).decode(errors="replace") == expected


@pytest.mark.parametrize(
    ("spelling", "byte"),
    [
        ("<0x00>", b"\x00"),
        ("<0xfF>", b"\xff"),
        ("<0x0>", None),
        ("<0x100>", None),
        ("x<0x00>", None),
        ("<0xGG>", None),
    ],
)
def test_byte_token(spelling: str, byte: bytes | None) -> None:
    assert byte_token(spelling) == byte
