"""GGUF vocabularies: the built-in model's against transformers, and every way to be malformed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from millrace.engine.errors import ModelError, UnsupportedModel
from millrace.engine.text.gguf_vocab import tokenizer_from_gguf
from millrace.engine.text.pieces import byte_level_piece
from millrace.engine.text.pretokenizers import find_pre_tokenizer
from millrace.engine.text.tokenizer import Tokenizer, load_tokenizer
from millrace.engine.weights.locate import ModelLocation


@pytest.fixture(scope="session")
def builtin(builtin_location: ModelLocation) -> Tokenizer:
    return load_tokenizer(builtin_location)


@pytest.mark.model
def test_builtin_ids_and_text_equal_transformers(
    builtin: Tokenizer, builtin_reference: Any, text: str
) -> None:
    text += "<|im_start|>user\n" + text + "<|im_end|>\n"
    ids = builtin.encode(text)
    assert ids == builtin_reference(text).input_ids
    assert builtin.decode(ids, skip_special=False) == text == builtin_reference.decode(ids)
    assert builtin.decode(ids) == builtin_reference.decode(ids, skip_special_tokens=True)
    literal = builtin.encode(text, parse_special=False)
    assert not builtin.special_ids & set(literal)
    assert builtin.decode(literal) == text


@pytest.mark.model
def test_builtin_special_tokens(builtin: Tokenizer) -> None:
    assert (builtin.bos_id, builtin.eos_ids, builtin.vocab_size) == (1, {2}, 49152)
    assert builtin.encode("hi") == builtin.encode("hi", add_special=False)
    assert builtin.encode("12 3")[:2] == [builtin.encode(c)[0] for c in "12"]
    assert {0, 1, 2} <= builtin.special_ids


def test_byte_level_ids_equal_the_original(
    bpe_metadata: dict[str, Any], trained: Callable[[], Backend], text: str
) -> None:
    tokenizer = tokenizer_from_gguf(bpe_metadata)
    text += "<tool></s>" + text
    assert tokenizer.encode(text) == trained().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 1234", "\n ", " x", " ÉA", "/", "B", "."]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "\n ", " x", " ÉA", "/", "B", "."]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", "\n", " ", " x", " ÉA", "/B", "."]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "\n", " ", " x", " ÉA", "/B", "."]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "\n", " ", " x", " ÉA", "/B", "."]),
        ("gpt-4o", ["It's", " ", "123", "4", "\n", " ", " x", " ÉA", "/B", "."]),
    ],
)
def test_pre_tokenizer_cuts_words(pre: str, words: list[str]) -> None:
    cut = find_pre_tokenizer(pre).splitter().pre_tokenize_str("".join(words))
    assert [byte_level_piece(spelling).decode() for spelling, _ in cut] == words


def test_whole_words_are_tokens_whatever_the_merges(bpe_metadata: dict[str, Any]) -> None:
    tokens, types = (bpe_metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
    metadata = bpe_metadata | {
        "tokenizer.ggml.tokens": [*tokens, "qzqz"],
        "tokenizer.ggml.token_type": [*types, 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    llama3 = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    merged = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "smaug-bpe"})
    assert llama3.encode("qzqz") == [len(tokens)]
    assert len(merged.encode("qzqz")) == 4


def test_qwen2_normalizes_to_form_c(bpe_metadata: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(bpe_metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")


def test_bos_is_added_where_the_file_or_its_kind_says(bpe_metadata: dict[str, Any]) -> None:
    def first(**keys: Any) -> int:
        named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        return tokenizer_from_gguf(bpe_metadata | named).encode("x")[0]

    bos = bpe_metadata["tokenizer.ggml.bos_token_id"]
    assert first() != bos
    assert first(add_bos_token=True) == bos
    assert first(pre="llama-bpe") == bos
    assert first(pre="llama-bpe", add_bos_token=False) != bos


def test_turn_ends_are_eos(bpe_metadata: dict[str, Any]) -> None:
    tokens, types = (bpe_metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
    size, eos = len(tokens), bpe_metadata["tokenizer.ggml.eos_token_id"]
    metadata = bpe_metadata | {
        "tokenizer.ggml.tokens": [*tokens, "<|eot_id|>", "<x>", "<|end|>", "", ""],
        "tokenizer.ggml.token_type": [*types, 3, 3, 1, 1, 1],
        "tokenizer.ggml.eot_token_id": size + 1,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.eos_ids == {eos, size, size + 1}, "an ordinary token <|end|> ends nothing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", None),
        ("tokens", "abc"),
        ("tokens", []),
        ("tokens", [1, 2]),
        ("token_type", [1]),
        ("token_type", [99] * 601),
        ("merges", None),
        ("merges", ["ab"]),
        ("merges", [" a"]),
        ("merges", ["a no-such-token"]),
        ("eos_token_id", 10**6),
        ("bos_token_id", -1),
        ("eot_token_id", "x"),
    ],
)
def test_malformed_byte_level_metadata_is_refused_by_key(
    bpe_metadata: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=rf"tokenizer\.ggml\.{key}"):
        tokenizer_from_gguf(bpe_metadata | {f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scores", None),
        ("scores", [0.0]),
        ("scores", [float("nan")]),
        ("scores", ["x"]),
        ("token_type", [1]),
    ],
)
def test_malformed_sentencepiece_metadata_is_refused_by_key(
    spm_metadata: dict[str, Any], key: str, value: Any
) -> None:
    size = len(spm_metadata["tokenizer.ggml.tokens"])
    value = value * size if value and len(value) == 1 and value != [0.0] else value
    with pytest.raises(ModelError, match=rf"tokenizer\.ggml\.{key}"):
        tokenizer_from_gguf(spm_metadata | {f"tokenizer.ggml.{key}": value})


def test_incomplete_byte_pieces_are_refused(spm_metadata: dict[str, Any]) -> None:
    types = list(spm_metadata["tokenizer.ggml.token_type"])
    types[types.index(6)] = 1
    with pytest.raises(ModelError, match="not a sentencepiece model"):
        tokenizer_from_gguf(spm_metadata | {"tokenizer.ggml.token_type": types})


def test_duplicate_token_is_refused_by_name(bpe_metadata: dict[str, Any]) -> None:
    tokens = list(bpe_metadata["tokenizer.ggml.tokens"])
    tokens[7] = tokens[6]
    with pytest.raises(ModelError, match="occurs twice"):
        tokenizer_from_gguf(bpe_metadata | {"tokenizer.ggml.tokens": tokens})


def test_unknown_kinds_are_named(bpe_metadata: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="'rwkv'"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedModel, match="'kimi-k2'"):
        tokenizer_from_gguf(bpe_metadata | {"tokenizer.ggml.pre": "kimi-k2"})
