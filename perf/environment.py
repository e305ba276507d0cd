"""Where a measurement was taken: goes into every result, so that it can be compared or repeated."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("millrace", "torch", "triton", "transformers", "grpcio", "numpy")


def environment(seed: int) -> dict[str, str | int | float | None]:
    """Commit, processor, versions, seed, command and time."""
    found: dict[str, str | int | float | None] = {
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],  # before the measurement: above 0, it had company
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": seed,
        "command": shlex.join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def _commit() -> str | None:
    """The checkout's commit, "+changes" where it has others; None outside of a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
