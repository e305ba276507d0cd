"""TransformersPeer: the benchmark's side of transformers_static.py, which runs beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType
from typing import Self

from millrace.engine.config import EngineConfig

MODULE = "millrace.perf.peers.transformers_static"


class TransformersPeer:
    """The process, from the benchmark's side."""

    def __init__(
        self, batch: int, prompt_tokens: int, output_tokens: int, dtype: str, config: EngineConfig
    ) -> None:
        """`dtype` by torch's name; the model and the threads are those of `config`."""
        options = [str(n) for n in (batch, prompt_tokens, output_tokens, config.threads or 0)]
        options += [dtype, config.model] if config.model else [dtype]
        command = [sys.executable, "-P", "-m", MODULE, *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Self:
        self._line()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def measure(self, seed: int, repeat: int) -> float:
        """Output tokens a second of one batch."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(f"{seed} {repeat}\n")
        self._process.stdin.flush()
        measured = json.loads(self._line())
        rate: float = measured["output_tokens"] / measured["seconds"]
        return rate

    def _line(self) -> str:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the transformers peer died with exit code {self._process.wait()}")
        return line
