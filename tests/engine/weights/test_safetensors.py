from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.weights.safetensors import SafetensorsCheckpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one file of two tensors."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards of one tensor each, and their index."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.full((2, 2), 1.0)}, tmp_path / FIRST)
    save_file({"b": torch.full((3,), 2.0)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_single_file_gives_names_shapes_and_stored_dtypes(single: Path) -> None:
    checkpoint = SafetensorsCheckpoint(single)
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert checkpoint.shape("a") == (2, 3)
    assert torch.equal(checkpoint.load("a"), torch.arange(6.0).reshape(2, 3))
    assert checkpoint.load("b").dtype == torch.bfloat16
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {}


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(single: Path) -> None:
    before = (single / "model.safetensors").read_bytes()
    SafetensorsCheckpoint(single).load("a").fill_(9)
    assert (single / "model.safetensors").read_bytes() == before


def test_generation_config_is_read_where_there_is_one(single: Path) -> None:
    (single / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert SafetensorsCheckpoint(single).generation_config == {"eos_token_id": [1, 2]}


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    checkpoint = SafetensorsCheckpoint(sharded)
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert checkpoint.load("a").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert checkpoint.load("b").tolist() == [2.0, 2.0, 2.0]


def test_a_missing_tensor_is_named(single: Path) -> None:
    checkpoint = SafetensorsCheckpoint(single)
    for read in (checkpoint.load, checkpoint.shape):
        with pytest.raises(WeightsError, match="tensor lm_head is missing"):
            read("lm_head")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(WeightsError, match=f"{SECOND} is missing"):
        SafetensorsCheckpoint(sharded)


def test_a_tensor_absent_from_its_shard_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": SECOND, "c": FIRST})
    with pytest.raises(WeightsError, match=f"{FIRST}: tensor c"):
        SafetensorsCheckpoint(sharded)


def test_a_truncated_file_is_named_with_both_sizes(single: Path) -> None:
    path = single / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    sizes = f"describes {len(whole)} bytes, the file has {len(whole) - 3}"
    with pytest.raises(WeightsError, match=f"model.safetensors is truncated: .*{sizes}"):
        SafetensorsCheckpoint(single)


def test_every_truncation_is_a_typed_error(single: Path) -> None:
    path = single / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            SafetensorsCheckpoint(single)


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"not json at all",
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"a": {"dtype": "XYZ", "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_a_malformed_header_is_a_typed_error(single: Path, header: bytes) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    (single / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors is malformed"):
        SafetensorsCheckpoint(single)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/inside.safetensors",
        "..",
        "",
        "a\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_entry_outside_the_folder_is_refused(sharded: Path, file: object) -> None:
    save_file({"b": torch.ones(1)}, sharded.parent / "outside.safetensors")
    write_index(sharded, {"a": FIRST, "b": file})
    with pytest.raises(WeightsError, match="tensor b lies in"):
        SafetensorsCheckpoint(sharded)


def test_an_index_entry_of_another_format_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": "pytorch_model-00002-of-00002.bin"})
    with pytest.raises(UnsupportedModel, match="weights are data"):
        SafetensorsCheckpoint(sharded)
    write_index(sharded, {"a": FIRST, "b": "config.json"})
    with pytest.raises(WeightsError, match=r"not a \.safetensors file"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(WeightsError, match="weight_map must map"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match=f"{name}: weights are data"):
        SafetensorsCheckpoint(tmp_path)


def test_a_folder_with_only_a_gguf_says_to_name_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"to serve model\.gguf, name that file"):
        SafetensorsCheckpoint(tmp_path)


def test_integers_are_refused_by_tensor_and_dtype(single: Path) -> None:
    save_file({"packed": torch.ones(4, dtype=torch.int32)}, single / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"tensor packed .* has dtype I32"):
        SafetensorsCheckpoint(single).load("packed")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\xff"])
def test_a_bad_config_is_named(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"config\.json"):
        SafetensorsCheckpoint(single)


def test_a_missing_config_is_named(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        SafetensorsCheckpoint(single)
