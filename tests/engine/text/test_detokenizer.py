"""IncrementalDetokenizer: any split of any ids gives what a decode of the whole gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.engine.text.detokenizer import IncrementalDetokenizer
from millrace.engine.text.model_files import ModelFiles
from millrace.engine.text.spm_tokenizer import load_spm_tokenizer
from millrace.engine.text.vocabulary import Tokenizer, Vocabulary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TableTokenizer(Tokenizer):
    """A vocabulary of every byte, a few longer pieces and control tokens; ids 256 and up."""

    EXTRA = (b" ", b" a", "日".encode(), b"<s>", b"</s>", b"", b"\xf0\x9f", b"\x91\x8d b")
    SPECIAL = frozenset({259, 260})

    def __init__(self, strips_leading_space: bool) -> None:
        pieces = (*(bytes([byte]) for byte in range(256)), *self.EXTRA)
        super().__init__(
            Vocabulary(pieces, self.SPECIAL, 259, frozenset({260}), strips_leading_space)
        )

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())


PARTS_OF_CHARACTERS = (0x20, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xC0)
IDS = st.lists(
    st.one_of(
        st.integers(-2, 270),  # beyond the vocabulary too
        st.sampled_from(
            [0x20, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xC0, *range(256, 264)]
        ),
    ),
    max_size=24,
)
SIZES = st.lists(st.integers(0, 4), max_size=24)


@given(ids=IDS, sizes=SIZES, skip=st.booleans(), spm=st.booleans())
@example(ids=[256, 256, 65], sizes=[1, 1, 1], skip=True, spm=True)
@example(ids=[259, 256, 65], sizes=[1, 1, 1], skip=True, spm=True)
@example(ids=[259, 256, 65], sizes=[1, 1, 1], skip=False, spm=True)
@example(ids=[0xF0, 0x80, 0x80, 0xED, 0xA0, 0x80], sizes=[1] * 6, skip=True, spm=False)
def test_any_split_equals_decode(ids: list[int], sizes: list[int], skip: bool, spm: bool) -> None:
    tokenizer = TableTokenizer(spm)
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    deltas, rest = [], ids
    for size in sizes:
        deltas.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    deltas += [detokenizer.push(rest), detokenizer.finish()]
    assert "".join(deltas) == tokenizer.decode(ids, skip)


@given(st.text())
def test_text_comes_as_soon_as_its_last_byte(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TableTokenizer(False))
    for char in text:
        data = char.encode()
        assert [detokenizer.push([byte]) for byte in data] == [""] * (len(data) - 1) + [char]
    assert detokenizer.finish() == ""


def test_an_open_character_ends_as_one_replacement() -> None:
    detokenizer = IncrementalDetokenizer(TableTokenizer(False))
    assert detokenizer.push(list("👍".encode())[:3]) == ""
    assert detokenizer.finish() == REPLACEMENT


def test_sentencepiece_bytes_and_leading_space(spm_file: Path) -> None:
    tokenizer = load_spm_tokenizer(spm_file, ModelFiles({}, {}, {}))
    text = "Hi 𐍈 👩‍👩‍👧‍👦!"
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = [detokenizer.push([i]) for i in tokenizer.encode(text)]
    assert deltas[:2] == ["", "Hi"]
    assert "".join(deltas) == text
    assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_only_if_asked(skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TableTokenizer(False), skip)
    assert detokenizer.push([259, 65, 260]) == ("A" if skip else "<s>A</s>")
