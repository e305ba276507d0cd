"""Checkpoint: one model on disk as a configuration and named tensors, whatever its file format.

Everything above this folder speaks in the keys of a Hugging Face `config.json` and in the tensor
names of Hugging Face's Llama ("model.layers.0.self_attn.q_proj.weight"); `safetensors.py` and
`gguf.py` translate. Weights are data: formats that can run code when opened are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.weights.safetensors import PICKLE_SUFFIXES, SafetensorsCheckpoint

Progress = Callable[[str, int, int], None]
"""Called with what is being read, how much of it is done, and the total (both in one unit)."""


class Checkpoint(Protocol):
    """A model's configuration and tensors; opening one reads headers only."""

    config: dict[str, Any]
    """In the keys of a Hugging Face config.json."""
    generation_config: dict[str, Any]
    """In the keys of a generation_config.json (`eos_token_id`, ...); empty where there is none."""

    def names(self) -> list[str]:
        """Return all tensor names, as in Hugging Face's Llama."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape, a matrix as (out, in). Raises WeightsError if missing."""

    def load(self, name: str) -> torch.Tensor:
        """Read one contiguous CPU tensor, in the stored float dtype or float32 if quantised.

        Not to be written to: it may be a view of the mapped file, shared with later calls.
        Raises WeightsError if it is missing or unreadable, UnsupportedModel for other dtypes.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder of safetensors or a .gguf file.

    Raises WeightsError for anything else, UnsupportedModel for pickled weights, and what the
    format's own class raises.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModel(f"{path}: weights are data: only safetensors and GGUF")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file or folder")
    if path.suffix != ".gguf":
        raise WeightsError(f"{path}: neither a folder with safetensors nor a .gguf file")
    # Here, for its package loads much that no other format needs: a second of every start.
    from millrace.engine.weights.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)


def take(checkpoint: Checkpoint, name: str, expected_shape: tuple[int, ...]) -> torch.Tensor:
    """Load `name`, which must have exactly `expected_shape`.

    Raises WeightsError naming the tensor, with both shapes if they differ.
    """
    found = checkpoint.shape(name)
    if found != expected_shape:
        raise WeightsError(f"tensor {name} has shape {found}, expected {expected_shape}")
    return checkpoint.load(name)
