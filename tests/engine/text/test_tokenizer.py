"""load_tokenizer picks the backend by what lies on disk; model_files bounds what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Backend

from millrace.engine.errors import ModelError
from millrace.engine.text import model_files
from millrace.engine.text.hf_tokenizer import HFTokenizer
from millrace.engine.text.spm_tokenizer import SPMTokenizer
from millrace.engine.text.tokenizer import load_tokenizer


@dataclass
class At:
    path: Path


def test_tokenizer_json_is_preferred_to_tokenizer_model(
    trained: Callable[[], Backend], spm_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_file.read_bytes())
    assert isinstance(load_tokenizer(At(tmp_path)), SPMTokenizer)
    trained().save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(At(tmp_path)), HFTokenizer)


def test_gguf_file_has_its_own_vocabulary(
    bpe_metadata: dict[str, object], tmp_path: Path, trained: Callable[[], Backend]
) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(bpe_metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(bpe_metadata["tokenizer.ggml.pre"])
    writer.add_token_list(bpe_metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(bpe_metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(bpe_metadata["tokenizer.ggml.merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = "Hello</s> 日本"
    assert load_tokenizer(At(path)).encode(text) == trained().encode(text).ids


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(At(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("config.json", "[]", "object is expected, not list"),
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id 'x'"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "eos_token_id"),
        ("config.json", '{"eos_token_id": 99999999999}', "eos_token_id"),
    ],
)
def test_malformed_json_is_refused_by_file(
    trained: Callable[[], Backend], tmp_path: Path, name: str, content: str, message: str
) -> None:
    trained().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(At(tmp_path))
    assert name in str(caught.value)


def test_file_larger_than_its_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    monkeypatch.setattr(model_files, "MAX_CONFIG_BYTES", 50)
    with pytest.raises(ModelError, match=r"config\.json: larger than 50 bytes"):
        load_tokenizer(At(tmp_path))
