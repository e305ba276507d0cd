"""How the demo shows its streams: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from millrace.perf.loadgen.record import Record

WAITING, STREAMING = "waiting", "streaming"
REFRESH_PER_S = 8
FRAME_LINES = 5  # of the screen, for the table's head and what is around it
TAIL_CHARS = 60


@dataclass(slots=True)
class Row:
    """One request on the screen."""

    label: str
    record: Record
    text: str = ""
    state: str = WAITING  # or STREAMING, then how it ended

    @property
    def tail(self) -> str:
        """The end of the text, on one line."""
        return " ".join(self.text[-TAIL_CHARS:].split())


class View(Protocol):
    """Told of each change."""

    def changed(self, index: int, row: Row) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def view_of(rows: list[Row]) -> View:
    """What suits standard output."""
    return LiveTable(rows) if sys.stdout.isatty() else Lines()


class Lines:
    """A line when a stream begins and when it ends."""

    def changed(self, index: int, row: Row) -> None:
        first = row.state == STREAMING and row.record.num_tokens == 1
        if first and row.record.ttft_s is not None:
            print(f"[{index:2}] {row.label}: first token after {row.record.ttft_s:.2f} s")
        elif row.state not in (WAITING, STREAMING):
            tokens = row.record.num_tokens
            print(f"[{index:2}] {row.label}: {row.state}, {tokens} tokens: {row.tail}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class LiveTable:
    """All streams at once; on a short screen those that run come first."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self._console = Console()
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=REFRESH_PER_S
        )

    def changed(self, index: int, row: Row) -> None:
        """Nothing to do: the table is drawn again several times a second."""

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        table.add_column("#", justify="right", width=2)
        table.add_column("request", no_wrap=True, width=24)
        table.add_column("state", no_wrap=True, width=12)
        table.add_column("tokens", justify="right", width=6)
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
        for index, row in self._visible():
            style = {WAITING: "dim", STREAMING: "cyan"}.get(row.state, "green")
            cells = (str(index), row.label, row.state, str(row.record.num_tokens), Text(row.tail))
            table.add_row(*cells, style=style)
        return table

    def _visible(self) -> list[tuple[int, Row]]:
        room = max(1, self._console.height - FRAME_LINES)
        order = {STREAMING: 0, WAITING: 2}  # what has ended stands between
        numbered = sorted(enumerate(self._rows), key=lambda pair: order.get(pair[1].state, 1))
        return sorted(numbered[:room], key=lambda pair: pair[0])
