"""A part of the suite while it runs: its device, its time, its ceilings, and where rows go."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from millrace.perf.kernels.case import OURS, Absent, Case, Provider, Row
from millrace.perf.measure import Timing, rotations, time_calls

CHECK_SEED = 1 << 20
"""The check's inputs are not those that are timed."""
MEMORY_SHARE = 0.7
"""Of the device's memory, for the inputs of a case."""


class Skip(Exception):
    """Raised by a part that cannot run here; the text says why."""


def open_device(dry_run: bool) -> torch.device:
    """The GPU, or the CPU for a dry run; RuntimeError where there is no GPU."""
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU here; --dry-run runs on a CPU")
    return torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in this run, see ceilings.py."""

    copy_bytes_per_s: float  # of a large copy, bytes read plus bytes written
    matmul_flops_per_s: float  # dense bf16 on random data
    copy_by_bytes: Mapping[int, float]  # the same rate for copies of fewer bytes

    def copy_at(self, size: int) -> float:
        """The rate of a copy that moves `size` bytes: between two measured sizes, by logarithm."""
        sizes = sorted(self.copy_by_bytes)
        above = next((i for i, known in enumerate(sizes) if known >= size), len(sizes))
        if above == len(sizes):
            return self.copy_bytes_per_s
        if above == 0:  # below the smallest, a copy takes as long as the smallest
            return self.copy_by_bytes[sizes[0]] * size / sizes[0]
        low, high = sizes[above - 1], sizes[above]
        weight = math.log(size / low) / math.log(high / low)
        rates = self.copy_by_bytes[low], self.copy_by_bytes[high]
        return math.exp((1 - weight) * math.log(rates[0]) + weight * math.log(rates[1]))


@dataclass(slots=True)
class Session:
    """What a part's `run` gets. `record` writes a row (a dictionary) at once."""

    device: torch.device
    dry_run: bool
    seed: int
    deadline: float  # of time.monotonic()
    record: Callable[[dict[str, Any]], None]
    ceilings: Ceilings | None = None  # None while they are measured themselves
    compiles: tuple[int, int] | None = None  # (i, n): compile every n-th case from i on, no more
    folder: Path = Path()  # of the results, for what is a file of its own: traces
    vllm_python: str = sys.executable  # an interpreter that may have vLLM
    cut: bool = field(default=False)  # whether something was left out for lack of time

    def out_of_time(self) -> bool:
        """Whether the part must end now; remembers that it did."""
        self.cut = self.cut or time.monotonic() > self.deadline
        return self.cut

    def measure_all(self, cases: Iterable[Case]) -> list[Row]:
        """Check and time each provider on each case, until the time is up; the recorded rows."""
        rows: list[Row] = []
        if self.compiles is not None:
            for case in islice(cases, self.compiles[0], None, self.compiles[1]):
                self._compile(case)
            return rows
        for case in cases:
            if self.out_of_time():
                break
            for name, provider in case.providers.items():
                rows.append(self.measure(case, name, provider))
                print(line_of(rows[-1]), flush=True)
                self.record(asdict(rows[-1]))
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return rows

    def _compile(self, case: Case) -> None:
        """Run our forms once, small: Triton keeps what it compiled on the disk."""
        for name, provider in case.providers.items():
            if name.startswith(OURS) and isinstance(provider, Provider):
                with suppress(Exception):  # it comes again, and is reported, when it is measured
                    provider.prepare(case.make_small(self.seed))()

    def measure(self, case: Case, name: str, provider: Provider | Absent) -> Row:
        """One provider on one case: no time without a passed check."""
        goal = case.goal if name == OURS else None
        work = (case.bytes, case.flops)
        row = Row(case.kernel, case.name, name, *work, goal, case.axes, "skipped")
        if isinstance(provider, Absent):
            return replace(row, note=provider.reason)
        needed = case.bytes + provider.extra_bytes
        if not self.fits(needed):
            return replace(row, note=f"{needed / 1e9:.0f} GB do not fit in memory")
        timing = self.checked_timing(case, provider)
        if isinstance(timing, Timing):
            return self._timed(row, case, timing)
        return replace(row, status="FAILED" if name.startswith(OURS) else "unusable", note=timing)

    def checked_timing(self, case: Case, provider: Provider) -> Timing | str:
        """The time, or what is wrong with the results."""
        try:
            return self._check(case, provider) or self._time(case, provider)
        except Exception as error:  # somebody's kernel: whatever it raises is a result
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the context is lost, and the part with it
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def fits(self, size: int) -> bool:
        """Whether inputs of `size` bytes fit in the device's memory."""
        if self.device.type != "cuda":
            return True
        return size <= MEMORY_SHARE * torch.cuda.get_device_properties(self.device).total_memory

    def _check(self, case: Case, provider: Provider) -> str:
        seed = self.seed + CHECK_SEED
        inputs = case.make_small(seed)
        got = provider.prepare(inputs)()
        wanted = case.reference(case.make_small(seed))()
        return (provider.check or case.check)(inputs, got, wanted)

    def _time(self, case: Case, provider: Provider) -> Timing:
        count = rotations(case.bytes, self.device)
        calls = [provider.prepare(case.make(self.seed + i)) for i in range(count)]
        return time_calls(calls, self.device, provider.capturable)

    def _timed(self, row: Row, case: Case, timing: Timing) -> Row:
        assert self.ceilings is not None, "the suite measures the ceilings first"
        seconds = timing.median_us / 1e6
        rate, at_size = case.bytes / seconds, None
        if case.bound == "memory":
            share = rate / self.ceilings.copy_bytes_per_s
            at_size = rate / self.ceilings.copy_at(case.bytes)
        else:
            share = case.flops / seconds / self.ceilings.matmul_flops_per_s
        return replace(
            row,
            status="measured",
            median_us=timing.median_us,
            p20_us=timing.p20_us,
            p80_us=timing.p80_us,
            mode=timing.mode,
            share=share,
            share_at_size=at_size,
            ok=None if row.goal is None or self.dry_run else share >= row.goal,
        )


def line_of(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.kernel:16} {row.case:28} {row.provider:20}"
    if row.median_us is None or row.share is None:
        return f"{head} {row.status}: {row.note}"
    spread = f"({row.p20_us:.2f} to {row.p80_us:.2f})"
    goal = "" if row.ok is None else f", goal {row.goal:.0%}: {'yes' if row.ok else 'NO'}"
    return f"{head} {row.median_us:10.2f} us {spread:22} {row.share:6.1%}{goal}"
