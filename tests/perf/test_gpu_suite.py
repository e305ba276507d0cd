"""The suite as it is called, on a CPU: parts in processes of their own, files, restart, summary."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from millrace.perf.gpu_suite import PARTS, TOTAL_S
from millrace.perf.kernels import correctness
from millrace.perf.kernels.case import Row
from millrace.perf.kernels.session import Session, Skip
from millrace.perf.plot import line_chart
from millrace.perf.results import PartResult, load
from millrace.perf.summary import write_summary

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("attention", "sampling", "matmul", "kv_append", "norm", "activation")
END_TO_END = "exactness"  # the quickest; tests/perf/test_e2e.py has the others
DRY = ("--dry-run", "--seed", "3", "--commit", "c0ffee")
LIMIT_S = 240  # on a busy machine; alone it takes some ten seconds


def suite(*arguments, script="from millrace.perf import gpu_suite", path=()):
    """Run it with `arguments`, after `script` had its say."""
    code = f"{script}\nraise SystemExit(gpu_suite.main())"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    old = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *([old] if old else [])])
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A whole run but for the tests, which are tested below."""
    folder = tmp_path_factory.mktemp("suite")
    done = suite("--out", folder, "--only", *BENCHES, END_TO_END, *DRY)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_part_writes_its_rows_and_where_they_were_measured(dry_run):
    for part in ("ceilings", *BENCHES, END_TO_END):
        result = load(dry_run, part)
        assert result.status == "done" and result.rows, part
        assert result.environment["device"] == "cpu"
        assert result.environment["commit"] == "c0ffee" and result.environment["seed"] == 3
        assert result.environment["torch"] == torch.__version__
        assert result.environment["time"] and result.environment["command"]


@pytest.mark.parametrize("part", ["attention", "sampling"])
def test_our_kernels_pass_their_checks_in_the_interpreter(dry_run, part):
    ours = [row for row in load(dry_run, part).rows if row["provider"] == "millrace"]
    assert ours and {row["status"] for row in ours} == {"measured"}


def test_the_summary_shows_every_part_and_its_plots(dry_run):
    summary = (dry_run / "summary.md").read_text()
    assert "## correctness\n\nnot run" in summary
    for part in (*BENCHES, END_TO_END):
        assert f"## {part}" in summary
    assert "| greedy tokens | random weights | 0 wrong | 0 |" in summary
    pictures = sorted(path.name for path in dry_run.glob("*.svg"))
    assert "decode-by-batch.svg" in pictures
    for name in pictures:
        assert f"({name})" in summary
        ElementTree.parse(dry_run / name)


def test_the_summary_says_how_we_stand_beside_the_fastest_other(tmp_path):
    times = {"millrace": 10.0, "millrace GEMV": 9.0, "torch": 30.0, "cuBLAS": 12.5, "broken": None}
    result = PartResult(tmp_path, "matmul", {"device": "NVIDIA H200"})
    for name, time_us in times.items():
        row = Row("matmul", "c", name, 1, 1, None, {"rows": 1}, "measured", median_us=time_us)
        result.record(asdict(replace(row, p20_us=1.0, p80_us=2.0, share=0.9)))
    result.finish("done")
    write_summary(tmp_path, ["matmul"])
    summary = (tmp_path / "summary.md").read_text()
    assert "| 1.25 x cuBLAS |" in summary and summary.count(" x ") == 1
    assert "dry run" not in summary


def test_the_matmul_part_fills_the_table_of_forms(dry_run, tmp_path):
    """From the file of a part to rows of configs.json, as on a GPU; the device's name is "cpu"."""
    table = tmp_path / "configs.json"
    table.write_text("{}")
    command = [sys.executable, "-P", "-m", "millrace.perf.kernels.tune_rows"]
    command += [str(dry_run / "matmul.json"), "--file", str(table)]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    written = json.loads(table.read_text())["cpu"]
    assert written.keys() == {"linear_gemv", "linear_decode", "lm_head_draw"}
    for rows in written.values():
        for row in rows.values():
            assert row["constants"]["MAX_ROWS"] >= 0 and row["num_warps"] and row["measured_us"]


def test_one_part_can_be_run_again(dry_run):
    before = {path.name: path.read_bytes() for path in dry_run.glob("*.json")}
    assert suite("--out", dry_run, "--only", "norm", *DRY).returncode == 0
    after = {path.name: path.read_bytes() for path in dry_run.glob("*.json")}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"ceilings.json", "norm.json"} and before.keys() == after.keys()
    assert "decode-by-batch.svg" in (dry_run / "summary.md").read_text()


def test_all_parts_together_fit_in_the_time_of_the_suite():
    usual = [part for part in PARTS if not part.by_name]
    assert sum(part.budget_s + part.compile_s for part in usual) <= TOTAL_S
    assert all(part.budget_s <= TOTAL_S for part in PARTS)


def test_every_part_can_be_imported():
    for part in PARTS:
        assert callable(getattr(import_module(part.module), part.entry)), part.name


MODULES = {
    "crashing": """
import os, signal
def run(session):
    session.record({"status": "measured", "kernel": "before the crash"})
    os.kill(os.getpid(), signal.SIGSEGV)
""",
    "raising": "def run(session):\n    raise ValueError('no such kernel')\n",
    "unwritten": "import nowhere_to_be_found\n",
    "misspelt": "def run(session:\n",
    "hanging": "import time\ndef run(session):\n    time.sleep(600)\n",
    "slow": """
def run(session):
    while not session.out_of_time():
        session.record({"status": "measured"})
""",
    "wrong": """
import torch
from millrace.perf.kernels.case import Case, Provider, close_to
def double(x): return lambda: (2 * x,)
def triple(x): return lambda: (3 * x,)
def make(seed): return torch.ones(3)
def run(session):
    peers = {"millrace": Provider(triple)}
    session.measure_all([
        Case("double", "3", 1, 1, "memory", 0.9, make, make, double, peers, close_to(0.1), {})
    ])
""",
    "good": "def run(session):\n    session.record({'status': 'measured'})\n",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run of parts that end in every way there is: (the process, the folder)."""
    folder = tmp_path_factory.mktemp("broken")
    for name, text in MODULES.items():
        (folder / f"part_{name}.py").write_text(text)
    script = f"""
from millrace.perf import gpu_suite
from millrace.perf.gpu_suite import Part
gpu_suite.GRACE_S = 1.0
gpu_suite.PARTS = tuple(
    Part(name, f"part_{{name}}", 1.0 if name in ("hanging", "slow") else 60.0, False)
    for name in {tuple(MODULES)!r}
)
gpu_suite.write_summary = lambda folder, parts: None
"""
    return suite("--out", folder, *DRY, script=script, path=[folder]), folder


@pytest.mark.parametrize(
    ("part", "status", "note"),
    [
        ("crashing", "failed", "ended by SIGSEGV"),
        ("raising", "failed", "ValueError: no such kernel"),
        ("unwritten", "skipped", "needs nowhere_to_be_found"),
        ("misspelt", "failed", "SyntaxError: '(' was never closed (part_misspelt.py, line 1)"),
        ("hanging", "cut", "killed after 2 s"),
        ("slow", "cut", ""),
        ("wrong", "failed", "1 rows FAILED"),
        ("good", "done", ""),
    ],
)
def test_a_part_ends_for_itself_alone(broken, part, status, note):
    result = load(broken[1], part)
    assert (result.status, result.note) == (status, note), broken[0].stdout
    assert result.environment["commit"] == "c0ffee"


def test_a_crash_keeps_the_rows_before_it(broken):
    assert load(broken[1], "crashing").rows == [
        {"status": "measured", "kernel": "before the crash"}
    ]


def test_a_failed_check_gives_no_speed(broken):
    (row,) = load(broken[1], "wrong").rows
    assert row["status"] == "FAILED" and row["median_us"] is None


def test_the_exit_code_tells_of_failed_parts(broken):
    done = broken[0]
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("FAILED: crashing, raising, misspelt, wrong")


def test_kernels_are_compiled_by_several_processes(tmp_path):
    """Each does its share, one that dies does not disturb the others, all end before the part."""
    script = f"""
import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from millrace.perf import gpu_suite
from millrace.perf.isolated import run_isolated
def run(session):
    share, count = session.compiles
    if share == 0:
        os.abort()
    Path({str(tmp_path)!r}, f"{{share}} of {{count}}").touch()
gpu_suite.os.sched_getaffinity = lambda pid: range(6)
options = Namespace(dry_run=True, seed=0)
print(repr(run_isolated(partial(gpu_suite._compile, run, options), 60.0)))
raise SystemExit
"""
    assert suite(script=script).stdout.splitlines()[-1] == "''"
    assert {path.name for path in tmp_path.iterdir()} == {"1 of 3", "2 of 3"}


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = suite("--out", tmp_path, "--only", "norm")
    assert done.returncode == 1
    assert load(tmp_path, "norm").note == "RuntimeError: no GPU here; --dry-run runs on a CPU"


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path):
    for part in ("engine", "scheduler", "kernels", "perf", "client", "proto"):
        (tmp_path / part).symlink_to(ROOT / part)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHON"] = sys.executable
    script = str(tmp_path / "perf" / "gpu_suite.sh")
    command = ["sh", script, "--out", str(tmp_path / "out"), "--only", "ceilings", "--dry-run"]
    subprocess.run(command, check=True, timeout=LIMIT_S, env=environment, capture_output=True)
    assert json.loads((tmp_path / "out" / "ceilings.json").read_text())["status"] == "done"


# ---------------------------------------------------------------- the tests as a part

TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_holds(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="needs a GPU")
def test_skipped(): pass
"""


def session_for(rows, dry_run=False):
    return Session(torch.device("cpu"), dry_run, 0, time.monotonic() + 60, rows.append)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """write(text): a checkout with this one file of GPU tests."""
    folder = tmp_path / correctness.TESTS
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -ra\n")
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    return lambda text: (folder / "test_it.py").write_text(text)


def test_a_failed_test_is_a_failed_row_with_its_reason(checkout):
    checkout(TESTS)
    rows = []
    correctness.run(session_for(rows))
    ends = {row["test"].partition("::")[2]: row["status"] for row in rows[:2]}
    assert ends == {"test_holds": "passed", "test_fails": "FAILED"}
    assert rows[2]["status"] == "reason" and "assert 1 == 2" in rows[2]["note"]


@pytest.mark.parametrize("package", ["transformers", "nowhere_to_be_found"])
def test_the_runner_s_tests_run_where_their_models_can_be_made(monkeypatch, package):
    found = {"transformers": package == "transformers"}
    monkeypatch.setattr(correctness, "find_spec", lambda name: found.get(name))
    assert (correctness.RUNNER_TESTS in correctness._command(0, 1)) == found["transformers"]
    assert (ROOT / correctness.RUNNER_TESTS).is_file()


def test_no_test_at_all_is_a_failure_on_a_gpu_and_a_skip_in_a_dry_run(checkout):
    checkout("")
    with pytest.raises(RuntimeError, match="no test ran"):
        correctness.run(session_for([]))
    with pytest.raises(Skip, match="need a GPU"):
        correctness.run(session_for([], dry_run=True))


def test_a_file_that_cannot_be_imported_is_a_failure(checkout):
    checkout("import nowhere_to_be_found\n")
    with pytest.raises(RuntimeError, match="exit code"):
        correctness.run(session_for([]))


def test_processes_share_the_tests(checkout, monkeypatch):
    """Each runs once, five neighbours in one process."""
    checkout(
        "import pytest\n"
        + "".join(f"def test_{i}(): pass\n" for i in range(12))
        + "pytestmark = pytest.mark.gpu"
    )
    monkeypatch.setattr(correctness.os, "sched_getaffinity", lambda of: range(4))
    rows = []
    correctness.run(session_for(rows))
    assert sorted(row["test"].partition("_it.py::test_")[2] for row in rows) == sorted(
        map(str, range(12))
    )


def test_a_chart_of_one_point_is_valid():
    text = line_chart("a < b", "batch", {"us & them": [(4, 2.0)]}, goal=0.85)
    ElementTree.fromstring(text)
    assert "a &lt; b" in text and "goal 85%" in text
