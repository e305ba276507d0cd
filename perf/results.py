"""A part's results: one JSON file in the suite's folder, rewritten at each row.

    {"part", "status", "note", "seconds", "environment", "rows"}

Whatever ends a part, its file holds what it had measured by then. Status: "running", "done", "cut"
(out of time), "failed", "skipped" (`note` says why).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FAILED = "FAILED"


@dataclass(slots=True)
class PartResult:
    """`record` and `finish` write the file."""

    folder: Path
    part: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    status: str = "running"
    note: str = ""
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def record(self, row: dict[str, Any]) -> None:
        """A row; its "status" may be FAILED."""
        self.rows.append(row)
        self._write()

    def finish(self, status: str, note: str = "") -> None:
        """The end. Failed rows make a failed part."""
        failures = sum(row.get("status") == FAILED for row in self.rows)
        if failures and status != "skipped":
            status, note = "failed", "; ".join(filter(None, (f"{failures} rows FAILED", note)))
        self.status, self.note = status, note
        self._write()

    def _write(self) -> None:
        self.seconds = time.monotonic() - self.began
        whole = asdict(self)
        del whole["folder"], whole["began"]
        file = path_of(self.folder, self.part)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(unfinished, file)


def path_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def load(folder: Path, part: str) -> PartResult | None:
    """What the file of a part holds; None where there is none."""
    try:
        whole = json.loads(path_of(folder, part).read_text())
    except FileNotFoundError:
        return None
    return PartResult(folder, **whole, began=time.monotonic() - whole["seconds"])
