"""TemplateProcess: the parent's end of template_worker.py, one process for one chat template.

The kernel guarantees that the process answers or dies (see there), so a plain blocking read is
enough here. A process that died is replaced at the next request.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from typing import Any

from millrace.engine.errors import TemplateError

CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class TemplateSetup:
    """What the process needs to know before the first request; sent as JSON."""

    source: str
    variables: dict[str, Any]  # the same in each rendering; a request's own come first
    max_bytes: int  # of rendered text, in UTF-8
    memory_bytes: int  # address space of the process
    cpu_s: float  # CPU time for one compilation or rendering


class TemplateProcess:
    """Renders one template out of process. Threads may share it; they take turns."""

    def __init__(self, setup: TemplateSetup) -> None:
        """Starts the process and compiles the template. Raises TemplateError if that fails."""
        self._setup = setup
        self._lock = threading.Lock()
        self._start()

    def render(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer: one of "text", "refusal", "error" and "too_long" is in it.

        `variables` must be JSON. Raises TemplateError if the process died over it.
        """
        line = json.dumps(variables).encode() + b"\n"
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            return self._ask(line)

    def close(self) -> None:
        """End the process. Also happens when this object, or the interpreter, goes away."""
        self._finalizer()

    def _start(self) -> None:
        # -P: the current folder must not provide modules.
        command = [sys.executable, "-P", "-m", "millrace.engine.text.template_worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        answer = self._ask(json.dumps(asdict(self._setup)).encode() + b"\n")
        if "error" in answer:
            self.close()
            raise TemplateError(describe(answer))

    def _ask(self, line: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None, "the process was started with pipes"
        assert self._process.stdout is not None, "the process was started with pipes"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply.endswith(b"\n"):
            self.close()
            raise TemplateError(self._obituary(self._process.returncode))
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _obituary(self, returncode: int) -> str:
        if returncode == -signal.SIGPROF:
            return f"chat template: not done after {self._setup.cpu_s:g} s of CPU time"
        return f"chat template: its process ended unexpectedly (status {returncode})"


def describe(answer: dict[str, Any]) -> str:
    """An "error" answer as one line that names the template's line, if known."""
    where = f" line {answer['line']}" if answer["line"] else ""
    return f"chat template{where}: {answer['error']}"


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.communicate(timeout=CLOSE_TIMEOUT_S)  # closes its input, on which it returns
    except (subprocess.TimeoutExpired, OSError, ValueError):
        process.kill()
        process.wait()
