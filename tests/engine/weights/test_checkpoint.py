from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.weights.checkpoint import open_checkpoint, take
from millrace.engine.weights.gguf import GGUFCheckpoint
from millrace.engine.weights.safetensors import SafetensorsCheckpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_each_format_opens_as_itself(folder: Path, write_gguf) -> None:
    assert isinstance(open_checkpoint(folder), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(write_gguf()), GGUFCheckpoint)


@pytest.mark.parametrize("name", ["model.bin", "model.pt"])
def test_a_pickle_is_refused_by_name_unopened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}: weights are data"):
        open_checkpoint(tmp_path / name)


def test_what_is_no_model_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.gguf: no such file"):
        open_checkpoint(folder / "nowhere.gguf")
    with pytest.raises(WeightsError, match=r"config\.json: neither a folder"):
        open_checkpoint(folder / "config.json")


def test_take_gives_the_tensor_of_the_expected_shape(folder: Path) -> None:
    assert torch.equal(take(open_checkpoint(folder), "x", (2, 3)), torch.ones(2, 3))


def test_take_names_the_tensor_and_both_shapes(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"x has shape \(2, 3\), expected \(3, 2\)"):
        take(open_checkpoint(folder), "x", (3, 2))
    with pytest.raises(WeightsError, match="tensor y is missing"):
        take(open_checkpoint(folder), "y", (3, 2))
