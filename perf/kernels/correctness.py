"""The GPU tests of the kernels and of the runner: pytest, a row a test, read as it prints them.

Most of their time goes to compiling, which one process does on one core: so several share them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Timer

from millrace.perf.kernels.session import Session, Skip
from millrace.perf.results import FAILED

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/kernels/gpu"
RUNNER_TESTS = "tests/engine/runner/test_on_gpu.py"  # on models that transformers makes
MOST_PROCESSES = 8
ENDS = "PASSED|FAILED|ERROR|XFAIL|XPASS"
TEST_ENDS = re.compile(rf"^(\S+\.py::.+?) ({ENDS})\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.*)$")  # of pytest's summary at the end
ALL_PASSED, NONE_COLLECTED = 0, 5


@dataclass(slots=True)
class Outcome:
    """What all processes have printed so far; `read` may be called by several threads."""

    session: Session
    passed: int = 0
    failed: int = 0
    lock: Lock = field(default_factory=Lock)

    def read(self, process: subprocess.Popen[str]) -> int:
        """A process's lines to their end; its exit code."""
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            with self.lock:
                self._take(line)
        return process.wait()

    def _take(self, line: str) -> None:
        if "SKIPPED" not in line:
            print(line, end="", flush=True)
        if found := TEST_ENDS.match(line):
            test, end = found.groups()
            wrong = end in ("FAILED", "ERROR")
            self.passed, self.failed = self.passed + (end == "PASSED"), self.failed + wrong
            self.session.record({"test": test, "status": FAILED if wrong else end.lower()})
        elif reason := REASON.match(line):
            self.session.record({"test": reason[1], "status": "reason", "note": reason[2]})


def run(session: Session) -> None:
    """RuntimeError where pytest fails otherwise than by a test, or, on a GPU, tested nothing."""
    if find_spec("pytest") is None:
        raise Skip("needs pytest")
    if not (ROOT / TESTS).is_dir():
        raise Skip(f"needs a checkout: {TESTS} is not there")
    count = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))
    outcome, processes = Outcome(session), [_start(share, count) for share in range(count)]
    timers = [Timer(max(0.0, session.deadline - time.monotonic()), p.kill) for p in processes]
    for timer in timers:
        timer.start()
    with ThreadPoolExecutor(count) as readers:
        codes = set(readers.map(outcome.read, processes))
    for timer in timers:
        timer.cancel()
    passed, failed = outcome.passed, outcome.failed
    if session.out_of_time():
        raise RuntimeError(f"out of time after {passed} passed and {failed} failed tests")
    if not failed and (unexpected := codes - {ALL_PASSED, NONE_COLLECTED}):
        raise RuntimeError(f"pytest: exit code {min(unexpected)}")
    if not (passed or failed):
        if session.dry_run:
            raise Skip("the tests need a GPU")
        raise RuntimeError("no test ran on the GPU")


def _start(share: int, count: int) -> subprocess.Popen[str]:
    command = _command(share, count)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _command(share: int, count: int) -> list[str]:
    command = [sys.executable, "-u", "-P", "-m", "pytest", "-v", "-m", "gpu", TESTS]
    if find_spec("transformers") and (ROOT / RUNNER_TESTS).is_file():
        command.append(RUNNER_TESTS)
    return [*command, "-p", "millrace.perf.kernels.share", "--share", f"{share}/{count}"]
