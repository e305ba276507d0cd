"""resolve: from what a user calls a model to where it lies on this machine.

The only place that may fetch something: everything after it reads local files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub

from millrace.engine.errors import ModelError
from millrace.engine.weights.builtin import SMOLLM2, Progress, ensure

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
# Folders hold the same weights in other formats, and so do Mistral's consolidated files.
HUB_FILES_UNUSED = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """A model on this machine."""

    path: Path
    name: str  # what clients are told, unless configured
    format: Literal["folder", "gguf"]


def resolve(
    model: str | None, revision: str | None = None, progress: Progress | None = None
) -> ModelLocation:
    """Find `model`: None for the built-in one, a folder, a .gguf file or a hub id "org/name".

    What exists on disk is preferred to a hub id of that name. `revision` is a hub model's branch,
    tag or commit; a path has none. `progress` replaces the display of the built-in model's fetch.
    Raises ModelError if there is no such model or it can't be fetched.
    """
    if model is None:
        return ModelLocation(ensure(SMOLLM2, progress), SMOLLM2.name, "gguf")
    found = _on_disk(model)
    if found is not None:
        return found
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return ModelLocation(_from_hub(model, revision), model, "folder")
    raise ModelError(
        f"model {model!r} is neither a folder, nor a .gguf file, nor a hub id org/name "
        "(leave it out for the built-in model)"
    )


def _on_disk(model: str) -> ModelLocation | None:
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return ModelLocation(path, path.resolve().name, "folder")
        if path.suffix == ".gguf" and path.is_file():
            return ModelLocation(path, path.stem, "gguf")
    except (OSError, RuntimeError, ValueError):  # too long, ~nobody, a NUL: not a path
        return None
    return None


def _from_hub(model: str, revision: str | None) -> Path:
    """Return the snapshot's folder, from the local cache where it is complete or offline."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_FILES_UNUSED,
            )
        )
    # The hub's errors, its HTTP library's and the operating system's share no other base.
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"model {model!r}{at} is not on disk and could not be had from the Hugging Face hub: "
            f"{error}"
        ) from error
