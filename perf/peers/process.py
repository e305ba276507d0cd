"""PeerProcess: another engine in a process of its own, from the benchmark's side.

The process makes its engine and prints one line of JSON, what it says of itself. Then it answers
each line {"prompts": [[token id, ...], ...], "output_tokens": N} with one, {"output_tokens": ...,
"seconds": ...}: so many came in all, and it took so long to generate them, greedily and at once.
Its end, by its limit at the latest, gives back the memory of its device.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Prompts = Sequence[Sequence[int]]  # token ids


class PeerFailed(RuntimeError):
    """The peer ended, or was ended at its limit; the text has its last words."""


class PeerProcess:
    """Entering the context waits until it is ready; leaving it ends the process."""

    def __init__(
        self,
        command: Sequence[str],
        limit_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`limit_s` from now on it is killed. It is one process, in the group of its parent: who
        ends the group ends it too."""
        self._log = tempfile.NamedTemporaryFile(prefix="millrace-peer-")  # noqa: SIM115
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=environment
        )
        self._limit_s = limit_s
        self._watchdog = threading.Timer(limit_s or 0.0, self._process.kill)
        self._watchdog.daemon = True
        if limit_s is not None:
            self._watchdog.start()
        self.about: dict[str, Any] = {}  # its first line

    def __enter__(self) -> Self:
        try:
            self.about = self._line()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def measure(self, prompts: Prompts, output_tokens: int) -> float:
        """Output tokens a second of one batch; PeerFailed where some are missing."""
        assert self._process.stdin is not None, "it is a pipe"
        try:
            message = {"prompts": prompts, "output_tokens": output_tokens}
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the next line, which does not come, says why
        done = self._line()
        if done["output_tokens"] != len(prompts) * output_tokens:
            expected = f"{len(prompts)} x {output_tokens}"
            raise PeerFailed(f"{done['output_tokens']} tokens came of {expected}")
        rate: float = done["output_tokens"] / done["seconds"]
        return rate

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if line:
            message: dict[str, Any] = json.loads(line)
            return message
        code, is_late = self._process.wait(), self._watchdog.finished.is_set()
        log = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        why = f"killed after {self._limit_s:.0f} s" if is_late else f"exit code {code}"
        raise PeerFailed(f"{why}: {log[-1] if log else 'it said nothing'}")

    def _end(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "they are pipes"
            pipe.close()
        self._log.close()
