from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.engine.errors import ModelError
from millrace.engine.weights import locate
from millrace.engine.weights.builtin import SMOLLM2
from millrace.engine.weights.locate import ModelLocation, resolve

# In a process of its own: huggingface_hub reads its environment when it is imported.
RESOLVE = """
import json, sys
from millrace.engine.errors import ModelError
from millrace.engine.weights.locate import resolve
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        location = resolve(model, revision)
        answers.append([str(location.path), location.name, location.format])
    except ModelError as error:
        answers.append(str(error))
assert "torch" not in sys.modules  # the front end has no use for it
print(json.dumps(answers))
"""


def test_a_folder_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert resolve(str(folder)) == ModelLocation(folder, "my-model", "folder")
    monkeypatch.chdir(folder)
    assert resolve(".").name == "my-model"


def test_a_folder_is_preferred_to_a_hub_id(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == ModelLocation(Path("org/name"), "name", "folder")


def test_a_gguf_file_is_named_after_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "small.Q4_K.gguf"
    path.write_bytes(b"GGUF")
    assert resolve(str(path)) == ModelLocation(path, "small.Q4_K", "gguf")


def test_none_is_the_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(locate, "ensure", lambda *a: asked.append(a) or Path("/cache/x.gguf"))
    location = resolve(None)
    assert asked == [(SMOLLM2, None)]
    assert location == ModelLocation(Path("/cache/x.gguf"), "SmolLM2-135M-Instruct", "gguf")


@pytest.mark.parametrize(
    "model",
    ["", "nothing-here", "a/b/c", "../org", "org/model.gguf", "a\0b", "x" * 5000, "~nobody-x/y"],
)
def test_anything_else_is_told_what_is_accepted(model: str, monkeypatch) -> None:
    monkeypatch.setattr(locate, "_from_hub", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"neither a folder, nor a \.gguf file, nor a hub id"):
        resolve(model)


def test_a_pickle_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"neither a folder, nor a \.gguf file"):
        resolve(str(path))


def test_hub_ids_are_answered_from_the_cache_when_offline(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    asked = [["org/name", None], ["org/name", commit], ["org/name", "v2"], ["org/other", None]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    answer = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(asked)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    by_branch, by_commit, no_revision, no_model = json.loads(answer.stdout)
    assert by_branch == by_commit == [str(snapshot), "org/name", "folder"]
    assert "'org/name' at revision 'v2' is not on disk" in no_revision
    assert "'org/other' is not on disk and could not be had from the Hugging Face hub" in no_model
