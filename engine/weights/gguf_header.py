"""The header of a GGUF file: its typed metadata and its table of tensors, no weights read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package has a reader
too, but it wraps every token of the vocabulary in NumPy arrays (some fifty times slower than
this one) and trusts the lengths it reads; here each is checked against the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from millrace.engine.errors import UnsupportedModel, WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had 32-bit lengths and was replaced within weeks
DEFAULT_ALIGNMENT = 32  # bytes; of the data section, unless general.alignment says otherwise
MAX_DIMS = 4  # GGML_MAX_DIMS
STRING, ARRAY = 8, 9  # the value types that are not scalars
LENGTH = struct.Struct("<Q")
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, and how it is encoded."""

    shape: tuple[int, ...]  # outermost first: a matrix is (out, in)
    kind: GGMLQuantizationType
    offset: int  # bytes, from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open file: scalars as int, float, bool or str; arrays as lists of those."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    data: mmap.mmap


def read_gguf(path: Path) -> GGUFFile:
    """Map the file and read its header.

    Raises WeightsError for a file that is unreadable, truncated or malformed, UnsupportedModel for
    a version, byte order, split or tensor encoding that Millrace does not read.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise WeightsError(f"{path} cannot be read: {error}") from error
    cursor = _Cursor(path, data)
    tensor_count, value_count = _read_preamble(cursor)
    metadata = _read_table(cursor, value_count, lambda _: cursor.value(cursor.scalar("I")))
    if _positive(metadata.get("split.count", 1), "split.count", path) > 1:
        raise UnsupportedModel(f"{path} is one part of a split GGUF: merge the parts into one file")
    # Offsets in the table count from the data section, whose start is known only at its end.
    entries = _read_table(cursor, tensor_count, lambda name: _read_entry(cursor, name))
    alignment = _positive(metadata.get("general.alignment", DEFAULT_ALIGNMENT), "alignment", path)
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = {name: _placed(entry, start, name, cursor) for name, entry in entries.items()}
    return GGUFFile(path, metadata, tensors, data)


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Return all metadata, the tokenizer's included; raises as `read_gguf` does."""
    file = read_gguf(path)
    file.data.close()
    return file.metadata


class _Cursor:
    """Reads little-endian values one after another, never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def skip(self, size: int) -> int:
        """Advance by `size` bytes, all of which the file must have; return where they begin."""
        start = self.position
        if size > len(self.data) - start:
            raise WeightsError(
                f"{self.path} is truncated or malformed: {size} bytes wanted at offset {start}, "
                f"the file has {len(self.data)}"
            )
        self.position = start + size
        return start

    def scalar(self, code: str, count: int = 1) -> Any:
        """Read one scalar, or a tuple of them unless `count` is 1."""
        start = self.skip(struct.calcsize("<" + code) * count)
        values = struct.unpack_from(f"<{count}{code}", self.data, start)
        return values[0] if count == 1 else values

    def string(self) -> str:
        """Read one string: a 64-bit length, then UTF-8."""
        # The vocabulary and its merges come through here, so the length is not read by scalar().
        (length,) = LENGTH.unpack_from(self.data, self.skip(LENGTH.size))
        start = self.skip(length)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: string at offset {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Read one value of a metadata type."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item_kind, count = self.scalar("I"), self.scalar("Q")
            if item_kind == STRING:
                return [self.string() for _ in range(count)]
            return self._numbers(item_kind, count)
        return self.scalar(self._code(kind))

    def _numbers(self, kind: int, count: int) -> list[Any]:
        code = self._code(kind)
        start = self.skip(struct.calcsize("<" + code) * count)
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise WeightsError(f"{self.path}: unknown value type {kind} before {self.position}")
        return SCALARS[kind]


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return how many tensors and metadata values follow."""
    if cursor.data[:4] != MAGIC:
        raise WeightsError(f"{cursor.path} is not a GGUF file: it does not begin with GGUF")
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in VERSIONS:
        order = " (big-endian?)" if version & 0xFFFF == 0 else ""
        raise UnsupportedModel(f"{cursor.path} is GGUF version {version}{order}: only 2 and 3")
    tensor_count, value_count = cursor.scalar("Q", 2)
    return tensor_count, value_count


def _read_table(cursor: _Cursor, count: int, read: Callable[[str], T]) -> dict[str, T]:
    table: dict[str, T] = {}
    for _ in range(count):
        name = cursor.string()
        if name in table:
            raise WeightsError(f"{cursor.path}: {name!r} occurs twice")
        table[name] = read(name)
    return table


def _read_entry(cursor: _Cursor, name: str) -> TensorEntry:
    """Read one line of the tensor table; its offset still counts from the data section."""
    dims = cursor.scalar("I")
    if not 1 <= dims <= MAX_DIMS:
        raise WeightsError(f"{cursor.path}: tensor {name} has {dims} dimensions, not 1..{MAX_DIMS}")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UnsupportedModel(f"{cursor.path}: tensor {name} has unknown type {number}") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise WeightsError(
            f"{cursor.path}: tensor {name} of shape {shape} does not divide into {kind.name} "
            f"blocks of {block}"
        )
    return TensorEntry(shape, kind, offset, math.prod(shape) // block * block_bytes)


def _placed(entry: TensorEntry, start: int, name: str, cursor: _Cursor) -> TensorEntry:
    """Turn the offset into one from the start of the file, which must hold the whole tensor."""
    offset = start + entry.offset
    if offset + entry.size > len(cursor.data):
        raise WeightsError(
            f"{cursor.path} is truncated: tensor {name} ends at byte {offset + entry.size}, "
            f"the file has {len(cursor.data)}"
        )
    return TensorEntry(entry.shape, entry.kind, offset, entry.size)


def _positive(value: Any, key: str, path: Path) -> int:
    if not isinstance(value, int) or value < 1:
        raise WeightsError(f"{path}: {key} must be a positive integer, got {value!r}")
    return value
