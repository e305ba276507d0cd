"""Measurement: what one measurement of the engine says, and how it becomes a row of its part.

Goals here are bounds from above: a time over the least possible, a share of idle time, a count of
wrong tokens.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from millrace.perf.kernels.session import Session, Skip


@dataclass(slots=True)
class Measurement:
    """One row. `value` is a number in units of `metric`; the rest of what was found is in facts."""

    name: str
    case: str
    status: Literal["measured", "FAILED", "skipped"] = "measured"
    note: str = ""
    metric: str = ""
    value: float | None = None
    goal: float | None = None  # value at most
    ok: bool | None = None  # None: there is no goal, or it is a dry run
    facts: dict[str, Any] = field(default_factory=dict)


@contextmanager
def recorded(session: Session, name: str, case: str) -> Iterator[Measurement]:
    """A row, filled by the block and recorded at its end.

    An error in the block becomes its status, and costs no other row; but for the loss of the
    device, which ends the part.
    """
    row = Measurement(name, case)
    try:
        yield row
    except Skip as reason:
        row.status, row.note = "skipped", str(reason)
    except ModuleNotFoundError as error:
        row.status, row.note = "skipped", f"needs {error.name}"
    except Exception as error:
        row.status, row.note = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
    if row.value is not None and row.goal is not None and not session.dry_run:
        row.ok = row.value <= row.goal
    print(json.dumps(asdict(row)), flush=True)
    session.record(asdict(row))
    release(session.device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more; raises where the device is lost."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
