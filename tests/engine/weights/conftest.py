"""Writes small GGUF files; what is in them differs from test to test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

SIZES = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}

WriteGGUF = Callable[..., Path]


def write(
    path: Path,
    tensors: dict[str, Any] | None = None,
    arch: str = "llama",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a file with SIZES, changed by `metadata` (None removes a key; arch.* keys are short).

    A tensor is an array, or (raw bytes [rows, bytes in a row], its GGML type).
    """
    writer = GGUFWriter(path, arch)
    values = {f"{arch}.{key}": value for key, value in SIZES.items()} | (metadata or {})
    for key, value in values.items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    if tensors is None:
        tensors = {f"blk.{layer}.attn_norm.weight": np.ones(64, np.float32) for layer in range(2)}
        tensors["token_embd.weight"] = np.ones((80, 64), np.float32)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """`write` into this test's own folder."""
    return lambda **options: write(tmp_path / "tiny.gguf", **options)
