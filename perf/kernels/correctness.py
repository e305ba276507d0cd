"""The GPU tests of the kernels and of the runner: pytest, a row a test, read as it prints them.

Most of their time goes to compiling, so they run in several processes where pytest-xdist is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

from millrace.perf.kernels.session import Session, Skip
from millrace.perf.results import FAILED

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/kernels/gpu"
RUNNER_TESTS = "tests/engine/runner/test_on_gpu.py"  # on models that transformers makes
MOST_WORKERS = 8
ENDS = "PASSED|FAILED|ERROR|XFAIL|XPASS"
TEST_ENDS = re.compile(rf"^(\S+\.py::.+?) ({ENDS})\b")
TEST_ENDS_IN_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({ENDS}) (\S+\.py::.+?)\s*$")
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.*)$")  # of pytest's summary at the end
ALL_PASSED, NONE_COLLECTED = 0, 5


def run(session: Session) -> None:
    """RuntimeError where pytest fails otherwise than by a test, or, on a GPU, tested nothing."""
    if find_spec("pytest") is None:
        raise Skip("needs pytest")
    if not (ROOT / TESTS).is_dir():
        raise Skip(f"needs a checkout: {TESTS} is not there")
    passed = failed = 0
    with subprocess.Popen(_command(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        timer = Timer(max(0.0, session.deadline - time.monotonic()), process.kill)
        timer.start()
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            if "SKIPPED" not in line:
                print(line, end="", flush=True)
            if ended := _test_and_end(line):
                wrong = ended[1] in ("FAILED", "ERROR")
                passed, failed = passed + (ended[1] == "PASSED"), failed + wrong
                session.record({"test": ended[0], "status": FAILED if wrong else ended[1].lower()})
            elif reason := REASON.match(line):
                session.record({"test": reason[1], "status": "reason", "note": reason[2]})
        timer.cancel()
    if session.out_of_time():
        raise RuntimeError(f"out of time after {passed} passed and {failed} failed tests")
    if not failed and process.returncode not in (ALL_PASSED, NONE_COLLECTED):
        raise RuntimeError(f"pytest: exit code {process.returncode}")
    if not (passed or failed):
        if session.dry_run:
            raise Skip("the tests need a GPU")
        raise RuntimeError("no test ran on the GPU")


def _command() -> list[str]:
    command = [sys.executable, "-u", "-P", "-m", "pytest", "-v", "-m", "gpu", TESTS]
    if find_spec("transformers") and (ROOT / RUNNER_TESTS).is_file():
        command.append(RUNNER_TESTS)
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    return [*command, "-n", str(workers)] if find_spec("xdist") and workers > 1 else command


def _test_and_end(line: str) -> tuple[str, str] | None:
    if found := TEST_ENDS.match(line):
        return found[1], found[2]
    if found := TEST_ENDS_IN_WORKER.match(line):
        return found[2], found[1]
    return None
