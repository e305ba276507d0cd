"""TextStream: one answer on its way to the terminal, whoever gives it.

Iterate over it for the text, cancel it from a signal handler, and read `usage` once it has ended.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

ChatTurn = tuple[str, str]  # role and content
TextOrChat = str | list[ChatTurn]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer took. Seconds from when it was asked for."""

    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    total_s: float
    finish: str  # "stop", "length" or "cancelled"

    def __str__(self) -> str:
        decode_s = self.total_s - self.first_token_s
        rate = f", {(self.output_tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 else ""
        return (
            f"{self.prompt_tokens} prompt tokens, {self.output_tokens} output tokens, "
            f"first after {self.first_token_s:.2f} s{rate}, finished: {self.finish}"
        )


class TextStream(Protocol):
    """One answer on its way."""

    usage: Usage | None  # None until it has ended

    def __iter__(self) -> Iterator[str]:
        """Yield new text; ends early after `cancel`. Raises MillraceError."""

    def cancel(self) -> None:
        """Stop generating soon. Safe in a signal handler."""


@contextmanager
def interrupt_cancels(stream: TextStream) -> Iterator[None]:
    """Within, Ctrl-C cancels `stream` and nothing else."""

    def cancel(signum: int, frame: Any) -> None:
        stream.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
