"""A folder in Hugging Face's layout: config.json and safetensors files, one or sharded.

Files are memory-mapped, so a tensor costs its own bytes and opening costs the headers. The index of
a sharded model is input like any other: it may only name files that lie in the folder itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from millrace.engine.errors import UnsupportedModel, WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 * 2**20  # the index of a model with a million tensors is below this
HEADER_LENGTH_BYTES = 8  # a little-endian u64 in front of the JSON header
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsCheckpoint:
    """The Checkpoint of a folder; see `checkpoint.py` for the contract."""

    def __init__(self, folder: Path) -> None:
        """Open every file's header.

        Raises WeightsError for a missing, truncated or inconsistent file, UnsupportedModel where
        there are pickled weights only.
        """
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            _read_json(generation) if generation.exists() else {}
        )
        self._folder = folder
        self._file_of = _files_of_tensors(folder)
        self._open: dict[str, Any] = {
            file: _open(folder / file) for file in set(self._file_of.values())
        }
        self._check_index()

    def names(self) -> list[str]:
        """Return all tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`; raises WeightsError if there is no such tensor."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def load(self, name: str) -> torch.Tensor:
        """Read `name` in its stored dtype; raises UnsupportedModel if that is not a float."""
        handle = self._handle(name)
        dtype = handle.get_slice(name).get_dtype()
        if dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                f"tensor {name} in {self._folder / self._file_of[name]} has dtype {dtype}: "
                f"only {', '.join(FLOAT_DTYPES)}"
            )
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise WeightsError(f"{self._folder}: tensor {name} is missing")
        return self._open[self._file_of[name]]

    def _check_index(self) -> None:
        held = {file: set(handle.keys()) for file, handle in self._open.items()}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise WeightsError(f"{self._folder / file}: tensor {name} of {INDEX} is not in it")


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Map each tensor's name to the file that holds it, by the index or from the one file."""
    if (folder / INDEX).exists():
        return _read_index(folder / INDEX)
    if (folder / SINGLE).exists():
        return dict.fromkeys(_open(folder / SINGLE).keys(), SINGLE)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedModel(
            f"{folder} has only {pickles[0]}: weights are data: only safetensors and GGUF"
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    hint = f"; to serve {ggufs[0]}, name that file" if ggufs else ""
    raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: weight_map must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\0" in file or Path(file).name != file:
            raise WeightsError(
                f"{path}: tensor {name} lies in {file!r}, outside the model's folder"
            )
        if Path(file).suffix in PICKLE_SUFFIXES:
            raise UnsupportedModel(
                f"{path}: tensor {name} lies in {file}: weights are data: only safetensors and GGUF"
            )
        if Path(file).suffix != SUFFIX:
            raise WeightsError(f"{path}: tensor {name} lies in {file!r}, not a {SUFFIX} file")
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} {_what_is_wrong(path, error)}") from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Say in numbers if the file is truncated; else pass on the parser's words."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        header = file.read(min(header_bytes, MAX_JSON_BYTES))
    whole = HEADER_LENGTH_BYTES + header_bytes
    if size >= whole:
        whole += _data_bytes(header)
    if size < whole:
        return f"is truncated: its header describes {whole} bytes, the file has {size}"
    return f"is malformed: {error}"


def _data_bytes(header: bytes) -> int:
    """Return the size of the data section that a header describes; 0 where it can't be read."""
    try:
        entries = json.loads(header)
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        return int(max(ends))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return 0
