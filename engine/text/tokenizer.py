"""load_tokenizer: the tokenizer of a model on disk, whatever its format.

Data only: a tokenizer.json, a sentencepiece model or a GGUF's metadata; no pickle, no code from the
model. `Tokenizer` is what the rest of the engine sees (vocabulary.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from millrace.engine.errors import ModelError
from millrace.engine.text.gguf_vocab import tokenizer_from_gguf
from millrace.engine.text.hf_tokenizer import load_hf_tokenizer
from millrace.engine.text.model_files import ModelFiles
from millrace.engine.text.spm_tokenizer import load_spm_tokenizer
from millrace.engine.text.vocabulary import Tokenizer
from millrace.engine.weights.gguf_header import read_gguf_metadata

__all__ = ["Tokenizer", "load_tokenizer"]


class Location(Protocol):
    """Where a model is: `engine/weights/locate.py` finds it."""

    @property
    def path(self) -> Path: ...


def load_tokenizer(location: Location) -> Tokenizer:
    """The tokenizer of the folder or the .gguf file at `location.path`.

    In a folder, tokenizer.json is preferred to tokenizer.model. Raises ModelError if there is
    neither or it is malformed, UnsupportedModel if it is of a kind that Millrace does not run.
    """
    path = location.path
    if path.is_file():
        return tokenizer_from_gguf(read_gguf_metadata(path))
    files = ModelFiles.read(path)
    if (path / "tokenizer.json").is_file():
        return load_hf_tokenizer(path / "tokenizer.json", files)
    if (path / "tokenizer.model").is_file():
        return load_spm_tokenizer(path / "tokenizer.model", files)
    raise ModelError(f"{path}: no tokenizer.json and no tokenizer.model")
