"""Sentencepiece models, from a folder and from GGUF metadata, against sentencepiece itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

from millrace.engine.errors import ModelError
from millrace.engine.text.gguf_vocab import tokenizer_from_gguf
from millrace.engine.text.model_files import ModelFiles, SpecialTokens
from millrace.engine.text.spm_tokenizer import (
    MAX_ADDED_TOKEN_CHARS,
    SPMTokenizer,
    load_spm_tokenizer,
)
from millrace.engine.text.vocabulary import Tokenizer


@pytest.fixture(scope="session")
def from_file(spm_file: Path) -> SPMTokenizer:
    return load_spm_tokenizer(spm_file, ModelFiles.read(spm_file.parent))


@pytest.fixture(scope="session")
def from_gguf(spm_metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(spm_metadata)


@pytest.fixture(params=["from_file", "from_gguf"])
def tokenizer(
    request: pytest.FixtureRequest, from_file: Tokenizer, from_gguf: Tokenizer
) -> Tokenizer:
    return from_file if request.param == "from_file" else from_gguf


def test_ids_equal_sentencepieces(
    tokenizer: Tokenizer, spm_reference: SentencePieceProcessor, text: str
) -> None:
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert ids == spm_reference.EncodeAsIds(text)


def test_text_survives_the_round_trip(
    tokenizer: Tokenizer, spm_reference: SentencePieceProcessor, text: str
) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids) == spm_reference.DecodeIds(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # sentencepiece takes them for spaces


def test_bos_comes_first_unless_told_otherwise(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("hi") == [1, *tokenizer.encode("hi", add_special=False)]
    assert tokenizer.eos_ids == {2}


def test_control_tokens_are_parsed_without_a_space_after_them(tokenizer: Tokenizer) -> None:
    def ids(text: str, add_special: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special=add_special)

    word = tokenizer.encode("x</s>", add_special=False)
    assert ids("<s>x</s>") == [1, *ids("</s>x</s>")[1:-1], 2]
    assert ids("</s>x</s>")[1:-1] != word[:-1]  # "x" inside, "▁x" at the start of a text
    assert tokenizer.decode(ids("<s> x y</s>"), skip_special=False) == "<s> x y</s>"


def test_control_tokens_are_text_unless_parsed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s></s><unk>", add_special=False, parse_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "<s></s><unk>"


def test_token_bytes_are_raw(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日𐍈 x", add_special=False)
    pieces = [tokenizer.token_bytes(i) for i in ids]
    assert b"".join(pieces) == " 日𐍈 x".encode()
    assert b"\xf0" in pieces  # a byte of a character that has no token
    assert tokenizer.token_bytes(1) == tokenizer.token_bytes(0) == b""
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(tokenizer.vocab_size) == b""


@pytest.fixture(scope="session")
def llama(spm_file: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(spm_file, folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def test_ids_and_text_equal_transformers(
    tokenizer: Tokenizer, llama: LlamaTokenizer, text: str
) -> None:
    # Runs of spaces are left to the tests above: transformers' conversion ranks pieces by id, where
    # sentencepiece has scores, and adds no space before a text that begins with one.
    text = " ".join(["x", *text.replace("▁", " ").split()])
    ids = tokenizer.encode(text)
    assert ids == llama(text).input_ids
    assert tokenizer.decode(ids) == llama.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == llama.decode(ids)


def test_folder_adds_tokens_beyond_the_model(spm_file: Path, tmp_path: Path) -> None:
    shutil.copy(spm_file, tmp_path / "tokenizer.model")
    size = SentencePieceProcessor(model_file=str(spm_file)).vocab_size()
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(size): {"content": "<|im_end|>", "special": True},
            str(size + 2): {"content": "<think>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_spm_tokenizer(tmp_path / "tokenizer.model", ModelFiles.read(tmp_path))
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_ids == {size}
    ids = tokenizer.encode("<think>a<|im_end|>")
    assert (ids[0], ids[-1]) == (size + 2, size)
    assert tokenizer.decode(ids) == "<think>a"
    literal = tokenizer.encode("<think>a<|im_end|>", parse_special=False)
    assert literal[0] == size + 2, "a plain added token is always one token"
    assert size not in literal
    assert tokenizer.token_bytes(size + 1) == b""


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\x05"])
def test_malformed_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelError, match="not a sentencepiece model"):
        load_spm_tokenizer(tmp_path / "tokenizer.model", ModelFiles.read(tmp_path))


@pytest.mark.parametrize(
    "entries", [[], {"x": {"content": "<a>"}}, {"5": {}}, {"5": 1}, {"-1": {"content": "<a>"}}]
)
def test_malformed_added_tokens_are_refused(spm_file: Path, tmp_path: Path, entries: Any) -> None:
    shutil.copy(spm_file, tmp_path / "tokenizer.model")
    config = json.dumps({"added_tokens_decoder": entries})
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ModelError, match=r"added_tokens_decoder|token ids"):
        load_spm_tokenizer(tmp_path / "tokenizer.model", ModelFiles.read(tmp_path))


def test_control_tokens_nested_as_deep_as_allowed(spm_file: Path) -> None:
    added = {"<" * n: 40_000 + n for n in range(1, MAX_ADDED_TOKEN_CHARS + 1)}
    tokenizer = SPMTokenizer(spm_file.read_bytes(), SpecialTokens(), added)
    assert tokenizer.encode("<" * 300) == [40_128, 40_128, 40_044]
    with pytest.raises(ModelError, match="128 characters"):
        SPMTokenizer(spm_file.read_bytes(), SpecialTokens(), {"<" * 129: 5})
