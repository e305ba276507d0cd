"""ServerProcess: `millrace serve` as a subprocess, for the benchmark, the demo and tests."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from millrace.engine.errors import EngineUnavailable

# -P: the working directory is not searched for modules.
COMMAND = (sys.executable, "-P", "-m", "millrace.engine.cli", "serve")
ANY_PORTS = ("--port", "0", "--http-port", "0")
READY = re.compile(r"millrace: serving (.+) on grpc://(\S+), metrics on (http://\S+)/metrics")
START_TIMEOUT_S = 600.0  # the first start may fetch a model
STOP_TIMEOUT_S = 60.0
HTTP_TIMEOUT_S = 10.0
LAST_LINES = 20  # of its log, shown when it does not start


class ServerProcess:
    """A server on free ports. Entering the context waits until it serves; leaving it ends it."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        """`options` are those of `millrace serve`."""
        self._log = tempfile.NamedTemporaryFile(prefix="millrace-serve-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*COMMAND, *ANY_PORTS, *options], stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.model = ""  # these are known once it serves
        self.target = ""  # host:port of gRPC
        self.http = ""  # http://host:port

    @property
    def pid(self) -> int:
        """Of the front end; the core is its child."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Raises EngineUnavailable, with the end of its log, if it does not come to serve."""
        assert self._process.stdout is not None, "it is a pipe"
        watchdog = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if ready := READY.match(line):
                    self.model, self.target, self.http = ready.groups()
                    return self
        except BaseException:
            self._end()
            raise
        finally:
            watchdog.cancel()
        code = self._process.wait()
        log = Path(self._log.name).read_text(errors="replace").splitlines()[-LAST_LINES:]
        self._end()
        raise EngineUnavailable(f"the server ended with exit code {code}:\n" + "\n".join(log))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def stop(self) -> int:
        """Ask it to drain and leave; returns its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_TIMEOUT_S)

    def metrics(self) -> str:
        """The page at /metrics."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=HTTP_TIMEOUT_S) as page:
            text: str = page.read().decode()
            return text

    def _end(self) -> None:
        self._process.kill()  # does nothing once it was waited for
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def metric(page: str, name: str) -> float:
    """The value of a metric without labels on a /metrics page; 0 if it is not there."""
    for line in page.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0
