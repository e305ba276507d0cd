"""tokenizer.json files, against the library's own encoding and decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from millrace.engine.errors import InvalidRequest, ModelError, UnsupportedModel
from millrace.engine.text.hf_tokenizer import HFTokenizer, load_hf_tokenizer
from millrace.engine.text.model_files import ModelFiles, SpecialTokens

BOS, EOS = 0, 1


def saved(folder: Path, backend: Backend, **tokenizer_config: Any) -> HFTokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return load_hf_tokenizer(folder / "tokenizer.json", ModelFiles.read(folder))


def with_template(backend: Backend) -> Backend:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return backend


def test_ids_and_text_equal_transformers(
    trained: Callable[[], Backend], tmp_path: Path, text: str
) -> None:
    tokenizer = saved(tmp_path, with_template(trained()), bos_token="<s>", eos_token="</s>")
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text += "</s><tool>" + text
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert tokenizer.encode(text, add_special=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    literal = tokenizer.encode(text, add_special=False, parse_special=False)
    assert EOS not in literal
    assert tokenizer.decode(literal) == text


@given(st.lists(st.integers(0, 599)))
def test_decode_of_any_ids_equals_the_librarys(
    trained: Callable[[], Backend], ids: list[int]
) -> None:
    backend = trained()
    tokenizer = HFTokenizer(trained(), SpecialTokens())
    assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.decode(ids, skip_special=False) == backend.decode(ids, False)


def test_sentencepiece_like_pipeline_decodes_as_the_library_does() -> None:
    vocab = {"<unk>": 0, "▁Hi": 1, "▁": 2, "x": 3, **{f"<0x{b:02X}>": 4 + b for b in range(256)}}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = HFTokenizer(Backend.from_str(backend.to_str()), SpecialTokens())
    euro = [4 + byte for byte in "€".encode()]
    for ids in ([1, 2, 3], [2, 2, 1], [*euro, 1], [3, *euro, 3], [4 + 0x20, 3]):
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.token_bytes(euro[0]) == b"\xe2"
    assert tokenizer.decode([euro[0], 1]) == "\ufffd Hi"


@pytest.mark.parametrize("flag", [True, False])
def test_explicit_add_bos_token_beats_the_template(
    trained: Callable[[], Backend], tmp_path: Path, flag: bool
) -> None:
    backend = trained() if flag else with_template(trained())
    tokenizer = saved(tmp_path, backend, bos_token="<s>", add_bos_token=flag)
    assert (tokenizer.encode("x")[0] == BOS) is flag
    assert tokenizer.encode("x", add_special=False)[0] != BOS


def test_truncation_and_padding_of_the_file_are_off(
    trained: Callable[[], Backend], tmp_path: Path
) -> None:
    backend = trained()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = saved(tmp_path, backend)
    for text in ("a", "a b c d e f g h"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_ids_come_from_all_configuration_files(
    trained: Callable[[], Backend], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 301, "bos_token_id": 0}')
    tokenizer = saved(tmp_path, trained(), eos_token={"content": "</s>"}, pad_token="a")
    assert tokenizer.eos_ids == {1, 300, 301}
    assert tokenizer.bos_id == 0
    assert tokenizer.special_ids == {0, 1, trained().token_to_id("a")}, "EOS 300 stays text"


def test_token_bytes_are_raw(trained: Callable[[], Backend]) -> None:
    tokenizer = HFTokenizer(trained(), SpecialTokens())
    ids = tokenizer.encode("𐍈 é</s><tool>")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "𐍈 é<tool>".encode()
    assert tokenizer.token_bytes(EOS) == b""


def test_lone_surrogate_is_refused(trained: Callable[[], Backend]) -> None:
    with pytest.raises(InvalidRequest, match="character 3") as caught:
        HFTokenizer(trained(), SpecialTokens()).encode("abc\ud800")
    assert caught.value.field == "text"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1, 2", b"\xff\xfe", b'{"model": {"type": "X"}}']
)
def test_malformed_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_hf_tokenizer(tmp_path / "tokenizer.json", ModelFiles.read(tmp_path))


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "none"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Fuse(), decoders.CTC()]), "CTC"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
    ],
)
def test_unknown_decoder_is_named(trained: Callable[[], Backend], decoder: Any, name: str) -> None:
    backend = trained()
    backend.decoder = decoder
    with pytest.raises(UnsupportedModel, match=name):
        HFTokenizer(backend, SpecialTokens())


def test_enormous_id_is_refused(trained: Callable[[], Backend], tmp_path: Path) -> None:
    pipeline = json.loads(trained().to_str())
    pipeline["model"]["vocab"]["a"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline))
    with pytest.raises(ModelError, match="token ids, at most"):
        load_hf_tokenizer(tmp_path / "tokenizer.json", ModelFiles.read(tmp_path))
