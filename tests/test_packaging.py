"""The two wheels, built from a copy of the sources and installed into environments of their own.

The engine's environment borrows its dependencies from the one that runs the tests (they are
gigabytes); pip then says whether what the wheel declares is there. The client's has its own.
"""

import ast
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "kernels", "scheduler", "perf", "client", "proto")
FILES = ("pyproject.toml", "README.md", "LICENSE")
TIMEOUT_S = 300


def run(*command: str | Path) -> str:
    """Its standard output; fails with what it printed if it does."""
    # Away from the repository, whose folders would be importable.
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, wheels: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source)
    return next(wheels.glob("*.whl"))


def make_environment(path: Path, *requirements: str | Path) -> Path:
    """A new virtual environment with these installed; returns its Python."""
    run(sys.executable, "-m", "venv", path)
    python = path / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, as building leaves files behind."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sources, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the engine's wheel."""
    folder = tmp_path_factory.mktemp("engine")
    python = make_environment(folder, "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path in a .pth file brings packages, but no .pth files of theirs: not the editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for part in ("engine", "kernels", "scheduler", "perf", "client"):
        for path in (ROOT / part).rglob("*.py"):
            name = f"millrace/{path.relative_to(ROOT).as_posix()}"
            assert name in names, f"{name} is not in the wheel"
    assert "millrace/kernels/configs.json" in names
    assert "millrace/v1/inference.proto" in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "engine/"))]


def test_the_installed_engine_works_beside_transformers(python: Path) -> None:
    """A top-level package called kernels would break transformers, which looks for another."""
    code = (
        "import transformers, importlib.util, millrace.engine, millrace.kernels.dispatch\n"
        "from transformers import LlamaForCausalLM\n"
        "from millrace.engine import LLM, SamplingParams\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "print(millrace.engine.__file__)"
    )
    file = run(python, "-P", "-c", code).strip()
    assert Path(file).is_relative_to(python.parents[1])
    assert "serve" in run(python.parent / "millrace", "--help")


def test_the_engine_declares_what_it_needs(python: Path) -> None:
    """Everything that it imports is named by its metadata, and what is named is here."""
    code = (
        "from importlib import metadata\n"
        "from packaging.requirements import Requirement\n"
        "for text in metadata.requires('millrace'):\n"
        "    wanted = Requirement(text)\n"
        "    if wanted.marker is None or wanted.marker.evaluate({'extra': ''}):\n"
        "        assert metadata.version(wanted.name) in wanted.specifier, text\n"
        "        print(wanted.name)"
    )
    declared = set(run(python, "-P", "-c", code).split())
    modules = {
        name
        for part in ("engine", "kernels", "scheduler", "client")
        for path in (ROOT / part).rglob("*.py")
        for name in imported(path)
    }
    known = metadata.packages_distributions()
    foreign = {name for name in modules - sys.stdlib_module_names - {"millrace"} if name in known}
    needed = {name: {normal(dist) for dist in known[name]} for name in foreign}
    missing = [n for n, dists in needed.items() if not dists & {normal(d) for d in declared}]
    assert missing == []


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_installed_client_works_without_torch(
    sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wheel = build(sources / "client", tmp_path_factory.mktemp("client_wheel"))
    constraints = ROOT / "constraints.txt"
    python = make_environment(tmp_path_factory.mktemp("client"), "-c", constraints, wheel)
    code = (
        "import importlib.util as u, millrace.client, millrace.v1.inference_pb2\n"
        "names = ('torch', 'numpy', 'triton', 'msgspec')\n"
        "print([name for name in names if u.find_spec(name)], u.find_spec('millrace.engine'))"
    )
    assert run(python, "-P", "-c", code).strip() == "[] None"
