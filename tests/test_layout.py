"""The shape of the repository: who may import whom, sizes, no module state, the eight-file walk.

Reads the sources as syntax trees, every import in them: those inside functions and those for
type checkers are arrows as well.
"""

import ast
import dataclasses
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.server import status
from millrace.engine.server.metrics import Metrics
from millrace.v1 import admin_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "millrace.engine": "engine",
    "millrace.kernels": "kernels",
    "millrace.scheduler": "scheduler",
    "millrace.perf": "perf",
    "millrace.client": "client",
}
STDLIB = sys.stdlib_module_names

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_TRITON_LINES = 120
MAX_EXAMPLE_LINES = 40
LONGER = {  # path or path:function -> why
    "tests/engine/test_async_engine.py": "one fixture, every way in which a request can end",
}

WALK = (
    "engine/server/inference_service.py",
    "engine/async_engine.py",
    "engine/core/loop.py",
    "scheduler/scheduler.py",
    "engine/runner/runner.py",
    "engine/models/decoder.py",
    "kernels/attention.py",
    "kernels/sampling.py",
)

# A part of the engine -> what it may import of the engine: the arrows of docs/architecture.md.
TEXT = (
    "millrace.engine.text",
    "millrace.engine.weights.gguf_header",
    "millrace.engine.errors",
    "millrace.engine.config",  # for its limits
)
LEAVES = (
    "millrace.engine.errors",
    "millrace.engine.config",
    "millrace.engine.sampling_params",
    "millrace.engine.core.messages",
)
MODEL = ("millrace.engine.models", "millrace.engine.weights", "millrace.kernels", *LEAVES)
RUNNER = (
    "millrace.engine.runner",
    "millrace.scheduler.plan",
    "millrace.scheduler.request",  # as a value: the runner reads what the plan admits
    *MODEL,
)
FRONT = ("millrace.engine.input", "millrace.engine.output", "millrace.engine.outbox", *LEAVES)
ALLOWED = {
    "scheduler": ("millrace.scheduler",),
    "kernels": ("millrace.kernels",),
    "client": ("millrace.client", "millrace.v1"),
    "engine/text": TEXT,
    "engine/weights": ("millrace.engine.weights", "millrace.engine.errors"),
    "engine/models": MODEL,
    "engine/runner": RUNNER,
    "engine/core/messages.py": ("millrace.engine.sampling_params",),
    "engine/core/loop.py": ("millrace.engine.core", "millrace.scheduler", *RUNNER),
    "engine/core": ("millrace.engine.core", "millrace.scheduler", *RUNNER),
    "engine/input.py": ("millrace.engine.text", *LEAVES),
    "engine/output.py": ("millrace.engine.text", *LEAVES),
    "engine/outbox.py": FRONT,
    "engine/live_requests.py": FRONT,
    "engine/async_engine.py": (
        "millrace.engine.core.process",
        "millrace.engine.live_requests",
        "millrace.engine.text",
        "millrace.engine.weights.locate",
        *FRONT,
    ),
    "engine/server": (
        "millrace.engine.server",
        "millrace.engine.async_engine",
        "millrace.engine.core.process",
        "millrace.engine.text",
        "millrace.v1",
        *FRONT,
    ),
}
THIRD_PARTY = {  # a part -> the packages that it may import besides the standard library
    "scheduler": {"numpy"},
    "kernels": {"torch", "triton", "xformers"},
    "client": {"grpc", "google"},
}
WITHOUT_TORCH = (  # what the front end's process and `--help` load
    "engine/server",
    "engine/text",
    "engine/async_engine.py",
    "engine/input.py",
    "engine/output.py",
    "engine/outbox.py",
    "engine/live_requests.py",
    "engine/core/process.py",
    "engine/core/ipc.py",
    "engine/core/messages.py",
    "engine/config.py",
    "engine/errors.py",
    "engine/sampling_params.py",
    "engine/weights/locate.py",
    "engine/weights/builtin.py",
    "engine/weights/gguf_header.py",
    "scheduler",
)


def python_files(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def sources() -> list[Path]:
    """All that is written by hand."""
    folders = [*PARTS.values(), "tests", "examples"]
    return [path for folder in folders for path in python_files(folder)]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            modules = [alias.name for alias in node.names if is_module(node.module, alias.name)]
            found |= {f"{node.module}.{name}" for name in modules} or {node.module}
    return found


def is_module(package: str, name: str) -> bool:
    """Whether `from package import name` imports a module of ours."""
    part = next((part for part in PARTS if is_within(package, part)), None)
    if part is None:
        return False
    folder = ROOT / PARTS[part] / package.removeprefix(part).strip(".").replace(".", "/")
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def rule_of(path: Path) -> tuple[str, ...] | None:
    """The arrows of a file: of itself, else of its nearest folder that has some."""
    for candidate in (path, *path.parents):
        if candidate == ROOT:
            return None
        if name_of(candidate) in ALLOWED:
            return ALLOWED[name_of(candidate)]
    return None


def is_within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


def test_imports_point_one_way():
    wrong = []
    for folder in PARTS.values():
        for path in python_files(folder):
            rule = rule_of(path)
            if rule is None:
                continue
            wrong += [
                f"{name_of(path)} imports {module}"
                for module in sorted(imports(path))
                if module.startswith("millrace.") and not any(is_within(module, to) for to in rule)
            ]
    assert wrong == []


def test_every_arrow_rule_is_about_a_file_that_exists():
    named = (*ALLOWED, *WITHOUT_TORCH, *THIRD_PARTY)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("part", THIRD_PARTY)
def test_a_library_imports_only_what_it_says(part):
    known = STDLIB | THIRD_PARTY[part] | {"millrace"}
    foreign = {
        f"{name_of(path)}: {module}"
        for path in python_files(part)
        for module in imports(path)
        if module.partition(".")[0] not in known
    }
    assert foreign == set()


def users_of(module: str, *places: str) -> list[str]:
    paths = [path for place in places for path in python_files(place)]
    return [name_of(p) for p in paths if any(is_within(m, module) for m in imports(p))]


def test_prometheus_is_imported_in_one_file():
    assert users_of("prometheus_client", "engine") == ["engine/server/metrics.py"]


def test_no_file_of_the_front_end_names_torch():
    assert users_of("torch", *WITHOUT_TORCH) == []
    assert users_of("millrace.kernels", *WITHOUT_TORCH) == []


@pytest.mark.parametrize(
    "command",
    ["import millrace.engine.server.grpc_server", "from millrace.engine.cli import app"],
    ids=["front end", "command line"],
)
def test_torch_is_not_loaded_by(command):
    """As the process sees it, whichever way the import would have come."""
    check = f"{command}\nimport sys\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", check], check=True, timeout=60)


# ---------------------------------------------------------------- state and sizes


def mutable_globals(path: Path) -> list[str]:
    """Names at a module's top level that hold a list, dict or set and are no UPPER_CASE table."""
    found = []
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if not is_mutable(value):
            continue
        found += [name for name in names if not (name.isupper() or name.startswith("__"))]
    return found


def is_mutable(value: ast.expr) -> bool:
    literals = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    if isinstance(value, literals):
        return True
    kinds = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray"}
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") in kinds


CHANGERS = {"append", "extend", "add", "update", "pop", "clear", "setdefault", "remove", "insert"}


def changed_tables(path: Path) -> set[str]:
    """Names at this module's top level that something in it changes or rebinds."""
    own = {
        target.id
        for node in tree_of(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    changed: list[ast.expr] = []
    rebound: set[str] = set()
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Global(names):
                rebound |= set(names)
            case ast.Call(func=ast.Attribute(value=table, attr=verb)) if verb in CHANGERS:
                changed.append(table)
            case ast.Subscript(value=table, ctx=ast.Store() | ast.Del()):
                changed.append(table)
    return rebound | {name.id for name in changed if isinstance(name, ast.Name)} & own


def test_no_module_keeps_state():
    wrong = [
        f"{name_of(path)}: {name}"
        for part in PARTS.values()
        for path in python_files(part)
        for name in (*mutable_globals(path), *changed_tables(path))
    ]
    assert wrong == []


def test_module_state_would_be_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("cache = {}\nTABLE = []\ndef f():\n    TABLE.append(1)\n    global g\n")
    assert mutable_globals(path) == ["cache"]
    assert changed_tables(path) == {"TABLE", "g"}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_triton(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_files_and_functions_stay_readable():
    too_long = {}
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long[name_of(path)] = lines
        for node in functions(path):
            if lines_of(node) > (MAX_TRITON_LINES if is_triton(node) else MAX_FUNCTION_LINES):
                too_long[f"{name_of(path)}:{node.name}"] = lines_of(node)
    assert {name: size for name, size in too_long.items() if name not in LONGER} == {}
    assert [name for name in LONGER if name not in too_long] == [], "no longer so long"


def test_every_module_says_what_it_is():
    silent = [
        name_of(path)
        for path in sources()
        if path.read_text(encoding="utf-8").strip()
        and path.name != "__init__.py"
        and not ast.get_docstring(tree_of(path))
    ]
    assert [name for name in silent if not name.startswith("tests/")] == []


def test_typed_everywhere():
    """Parts of the product annotate every argument and result; Triton's language has no types."""
    bare = []
    for part in PARTS.values():
        for path in python_files(part):
            for node in functions(path):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [a for a in arguments if a.arg not in ("self", "cls")]
                untyped = any(a.annotation is None for a in named)
                if not is_triton(node) and untyped and not path.stem.endswith("_triton"):
                    bare.append(f"{name_of(path)}:{node.name}")
    assert bare == []


# ---------------------------------------------------------------- documents


def short(name: str) -> str:
    """The last two parts of a path: a neighbour in the same part of the tree may be named so."""
    return "/".join(name.split("/")[-2:])


def test_the_walk_leads_from_file_to_file():
    for number, name in enumerate(WALK, start=1):
        words = ast.get_docstring(tree_of(ROOT / name)) or ""
        assert f"{number} of {len(WALK)}" in words, f"{name} does not say where it stands"
        if number > 1:
            assert short(WALK[number - 2]) in words, f"{name} does not name the file before it"
        if number < len(WALK):
            assert short(WALK[number]) in words, f"{name} does not name the file after it"


def test_the_architecture_page_shows_the_walk():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = [page.find(f"](../{name})") for name in WALK]
    assert -1 not in places and places == sorted(places)


def test_links_between_documents_lead_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")]:
        for link in page.read_text(encoding="utf-8").split("](")[1:]:
            target = link.partition(")")[0].partition("#")[0]
            if target and "://" not in target and not (page.parent / target).exists():
                broken.append(f"{name_of(page)} -> {target}")
    assert broken == []


def test_the_operations_page_lists_every_setting_with_its_default():
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            name, default = (cell.strip() for cell in line.split("|")[1:3])
            rows[name.strip("`")] = default.strip("`")
    for field in dataclasses.fields(EngineConfig):
        assert field.name in rows, f"docs/operations.md has no row for {field.name}"
        if field.default is not None:
            shown, default = rows[field.name], field.default
            same = shown == str(default).lower() or shown == str(default)
            number = isinstance(default, int | float) and not isinstance(default, bool)
            assert same or (number and float(shown) == default), f"{field.name}: {shown}"


def rows(page: str, heading: str) -> dict[str, str]:
    """The tables of a section: the name in the first cell (without labels) -> the second cell."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)(?:\{.*?\})?`[^|]*\|([^|]*)\|", section, re.MULTILINE)
    return {name: cell.strip() for name, cell in found}


def test_the_operations_page_lists_every_metric_with_its_type():
    types = re.findall(r"^# TYPE (millrace_\w+) (\w+)$", Metrics().render().decode(), re.MULTILINE)
    kinds = {name: kind for name, kind in types if not name.endswith("_created")}
    listed = {name: cell.split()[0] for name, cell in rows("operations.md", "Metrics").items()}
    assert listed == kinds


def test_the_api_page_lists_every_error_with_its_code():
    assert rows("api.md", "Errors") == {kind.__name__: code.name for kind, code in status._CODES}


@pytest.mark.parametrize("module", [inference_pb2, admin_pb2], ids=["inference", "admin"])
def test_the_api_page_lists_every_call(module):
    for name, service in module.DESCRIPTOR.services_by_name.items():
        assert rows("api.md", name).keys() == {method.name for method in service.methods}


def test_examples_are_short():
    sizes = {name_of(p): len(p.read_text().splitlines()) for p in python_files("examples")}
    assert sizes, "there are examples"
    assert {name: size for name, size in sizes.items() if size > MAX_EXAMPLE_LINES} == {}
