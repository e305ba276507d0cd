"""Where `generate` and `chat` get their text from: this process, or a server (`--target`)."""

from __future__ import annotations

from typing import Protocol

from millrace.engine.cli.text_stream import TextOrChat, TextStream
from millrace.engine.config import EngineConfig
from millrace.engine.sampling_params import SamplingParams


class Source(Protocol):
    """A model that answers."""

    name: str

    def stream(self, prompt: TextOrChat, params: SamplingParams) -> TextStream:
        """Start one answer to a text or to a conversation. Raises MillraceError."""


def open_source(
    config: EngineConfig, target: str | None, priority: int = 0, tenant: str = ""
) -> Source:
    """The server at `target`, or a model loaded into this process.

    `priority` and `tenant` are for the server; in this process, requests have nobody beside them.
    """
    if target is not None:
        from millrace.engine.cli.remote import RemoteModel

        return RemoteModel(target, priority, tenant)
    from millrace.engine.cli.local import LocalModel

    return LocalModel(config)
