"""The two ceilings: how fast this device copies memory, and how fast it multiplies matrices.

Copy: between two buffers of GBs, counting the bytes read plus the bytes written, by the driver's
copy and by a kernel (y = -x): the faster counts. And the same for powers of two below, since a copy
of a few megabytes is bound by its launch and by the way up to full speed; their buffers rotate, so
they are cold too. Matmul: a square bf16 product through torch's library, 2 N^3 operations, on
random data: zeros would let the clocks rise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from millrace.perf.kernels.session import Ceilings, Session
from millrace.perf.measure import Call, rotations, time_calls

LARGE_COPY_BYTES = 4 << 30  # moved: half read, half written
SMALL_COPIES_BYTES = tuple(1 << power for power in range(18, 31, 2))  # 256 KiB to 1 GiB
MATMUL_SIZE = 8192
DRY_COPY_BYTES, DRY_MATMUL_SIZE = 1 << 16, 32


def run(session: Session) -> None:
    """Record one row a measurement; `from_rows` makes Ceilings of them."""
    large = DRY_COPY_BYTES if session.dry_run else LARGE_COPY_BYTES
    for size in (large, *(() if session.dry_run else SMALL_COPIES_BYTES)):
        for how, copy in (("driver", Tensor.copy_), ("kernel", _negate)):
            _record(session, "copy", how, size, _copies(copy, size, session.device))
    n = DRY_MATMUL_SIZE if session.dry_run else MATMUL_SIZE
    a, b = (_random(n * n, session.device).view(n, n) for _ in range(2))
    _record(session, "matmul", "library", 2 * n**3, [lambda: a @ b])


def from_rows(rows: list[dict[str, Any]]) -> Ceilings:
    """Of the rows that `run` recorded; RuntimeError where they are not all there."""
    copies: dict[int, float] = {}
    for row in rows:
        if row["name"] == "copy":
            copies[row["work"]] = max(row["rate_per_s"], copies.get(row["work"], 0.0))
    matmuls = [row["rate_per_s"] for row in rows if row["name"] == "matmul"]
    if not (copies and matmuls):
        raise RuntimeError("the ceilings were not measured: there is nothing to take a share of")
    return Ceilings(copies[max(copies)], matmuls[0], copies)


def _record(session: Session, name: str, how: str, work: int, calls: list[Call]) -> None:
    timing = time_calls(calls, session.device)
    rate = work / timing.median_us * 1e6
    unit = "bytes" if name == "copy" else "flops"
    rates = f"{timing.median_us:10.2f} us, {rate / 1e12:8.3f} T{unit}/s"
    print(f"{name:8} {how:8} {work:14,d} {unit}: {rates}", flush=True)
    session.record(
        {"name": name, "how": how, "work": work, "rate_per_s": rate, "median_us": timing.median_us}
        | {"p20_us": timing.p20_us, "p80_us": timing.p80_us, "mode": timing.mode}
    )


def _negate(target: Tensor, source: Tensor) -> Tensor:
    return torch.neg(source, out=target)


def _copies(
    copy_into: Callable[[Tensor, Tensor], Tensor], size: int, device: torch.device
) -> list[Call]:
    def copy() -> Call:
        source = _random(size // 4, device)  # bf16, half of the bytes moved
        target = torch.empty_like(source)
        return lambda: copy_into(target, source)

    return [copy() for _ in range(rotations(size, device))]


def _random(elements: int, device: torch.device) -> Tensor:
    return torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
