from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from millrace.engine.errors import ModelError, UnsupportedModel, WeightsError
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.gguf_header import read_gguf, read_gguf_metadata


def test_metadata_of_every_type_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "llama")
    scalars = {
        GGUFValueType.UINT8: 200,
        GGUFValueType.INT8: -100,
        GGUFValueType.UINT16: 60000,
        GGUFValueType.INT16: -30000,
        GGUFValueType.UINT32: 2**32 - 1,
        GGUFValueType.INT32: -(2**31),
        GGUFValueType.FLOAT32: 0.1,
        GGUFValueType.UINT64: 2**64 - 1,
        GGUFValueType.INT64: -(2**63),
        GGUFValueType.FLOAT64: 0.1,
        GGUFValueType.BOOL: True,
    }
    for kind, value in scalars.items():
        writer.add_key_value(f"scalar.{kind.name}", value, kind)
        writer.add_key_value(f"array.{kind.name}", [value] * 3, GGUFValueType.ARRAY, kind)
    writer.add_string("string", "häßlich \U0001f600")
    writer.add_array("strings", ["a", "Ġthe", "日本", "x" * 1000])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    metadata = read_gguf_metadata(path)

    fields = GGUFReader(path).fields
    expected = {k: field.contents() for k, field in fields.items() if not k.startswith("GGUF.")}
    assert metadata == expected
    assert metadata["strings"] == ["a", "Ġthe", "日本", "x" * 1000]
    assert metadata["scalar.BOOL"] is True


def test_tensors_lie_where_the_gguf_package_finds_them(write_gguf) -> None:
    tensors = {"a.b": np.arange(5, dtype=np.float32), "token_embd.weight": np.ones((3, 7, 2))}
    path = write_gguf(tensors=tensors)

    header = read_gguf(path)

    for expected in GGUFReader(path).tensors:
        entry = header.tensors[expected.name]
        assert entry.kind == expected.tensor_type
        assert entry.shape == tuple(reversed(expected.shape.tolist()))
        assert (entry.offset, entry.size) == (expected.data_offset, expected.n_bytes)
    raw = header.data[header.tensors["a.b"].offset :][:20]
    assert np.frombuffer(raw, np.float32).tolist() == [0, 1, 2, 3, 4]


def test_an_alignment_of_its_own_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("x", np.full(4, 7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_gguf(path)

    offset = header.tensors["x"].offset
    assert offset % 256 == 0
    assert np.frombuffer(header.data[offset : offset + 16], np.float32).tolist() == [7, 7, 7, 7]


def test_every_truncation_is_a_typed_error_that_names_the_file(write_gguf, tmp_path: Path) -> None:
    whole = write_gguf(metadata={"tokenizer.ggml.tokens": ["a", "b", "c"]}).read_bytes()
    last = (80 * 64 + 2 * 64) * 4  # bytes of the tensors
    cut = tmp_path / "cut.gguf"
    for size in [*range(len(whole) - last), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"cut\.gguf"):
            read_gguf(cut)


def test_no_damaged_byte_raises_anything_but_a_model_error(write_gguf, tmp_path: Path) -> None:
    whole = write_gguf(metadata={"tokenizer.ggml.tokens": ["a", "b"], "x.scores": [1.0, 2.0]})
    data = whole.read_bytes()
    header = len(data) - (80 * 64 + 2 * 64) * 4
    random = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(1500):
        changed = bytearray(data)
        for position in random.integers(4, header, random.integers(1, 4)):
            changed[position] = random.integers(256)
        damaged.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(damaged)
            for name in checkpoint.names():
                checkpoint.load(name)
        except ModelError as error:
            assert "damaged.gguf" in str(error)
            refused += 1
    assert refused > 500  # most bytes of a header matter


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", WeightsError, "cannot be read"),
        (b"PK\x03\x04 this is a zip", WeightsError, "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), UnsupportedModel, "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedModel, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), WeightsError, "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), WeightsError, "truncated"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"ab", 99), WeightsError, "type 99"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), WeightsError, "not UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1),
            WeightsError,
            "value type 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**62),
            WeightsError,
            "truncated",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, data, error, message) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert "bad.gguf" in str(caught.value)


def _one_tensor(dims: tuple[int, ...], kind: int, offset: int = 0, copies: int = 1) -> bytes:
    entry = struct.pack(f"<Q1sI{len(dims)}QIQ", 1, b"t", len(dims), *dims, kind, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, copies, 0) + entry * copies + bytes(256)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (_one_tensor((2, 2, 2, 2, 2), 0), WeightsError, "tensor t has 5 dimensions"),
        (_one_tensor((), 0), WeightsError, "tensor t has 0 dimensions"),
        (_one_tensor((0, 4), 0), WeightsError, "tensor t of shape"),
        (_one_tensor((33, 2), 8), WeightsError, "Q8_0 blocks of 32"),
        (_one_tensor((4,), 77), UnsupportedModel, "tensor t has unknown type 77"),
        (_one_tensor((2**40, 2**40), 0), WeightsError, "tensor t ends at byte"),
        (_one_tensor((4,), 0, offset=2**63), WeightsError, "tensor t ends at byte"),
        (_one_tensor((4,), 0, copies=2), WeightsError, "'t' occurs twice"),
    ],
)
def test_a_bad_tensor_entry_is_refused_by_name(tmp_path: Path, data, error, message) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message):
        read_gguf(path)


def test_a_part_of_a_split_model_is_refused(write_gguf) -> None:
    with pytest.raises(UnsupportedModel, match="merge the parts"):
        read_gguf(write_gguf(metadata={"split.count": 3}))


def test_reading_metadata_keeps_no_mapping_open(write_gguf, monkeypatch) -> None:
    opened: list[mmap.mmap] = []
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    read_gguf_metadata(write_gguf())
    assert len(opened) == 1
    assert opened[0].closed
