"""From records to the figures that users compare, under the names of vLLM's benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from millrace.perf.loadgen.drive import Run

MS = 1000  # milliseconds a second
LAG_LIMIT_S = 0.001  # a client that sends later than this in 1 of 100 is too slow, or starved, ...
LAG_SHARE = 0.01  # ... unless that is less than this share of the median TTFT


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in milliseconds; zeros where nothing was measured."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if not seconds:
            return cls(0.0, 0.0, 0.0, 0.0)
        values = np.asarray(seconds) * MS
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(values.mean()), float(p50), float(p90), float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Only requests that succeeded count for tokens and latencies."""

    successful: int
    failures: dict[str, int]  # by gRPC status
    duration_s: float
    input_tokens: int
    output_tokens: int
    peak_output_tokens_per_s: float  # of the best second
    peak_concurrent: int
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    send_lag: Spread  # intended to sent

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def client_kept_up(self) -> bool:
        """Whether requests were sent when they were due; else the latencies blame the server."""
        limit_ms = max(LAG_LIMIT_S * MS, LAG_SHARE * self.ttft.median)
        return self.send_lag.p99 <= limit_ms

    def lines(self) -> list[str]:
        """The table, a line a figure."""
        per_s = 1.0 / self.duration_s if self.duration_s else 0.0
        total = self.input_tokens + self.output_tokens
        rows: list[tuple[str, float]] = [
            ("Successful requests", self.successful),
            ("Failed requests", sum(self.failures.values())),
            ("Benchmark duration (s)", self.duration_s),
            ("Total input tokens", self.input_tokens),
            ("Total generated tokens", self.output_tokens),
            ("Request throughput (req/s)", self.successful * per_s),
            ("Output token throughput (tok/s)", self.output_tokens_per_s),
            ("Peak output token throughput (tok/s)", self.peak_output_tokens_per_s),
            ("Peak concurrent requests", self.peak_concurrent),
            ("Total token throughput (tok/s)", total * per_s),
        ]
        for name, spread in self._spreads():
            rows.append((f"Mean {name} (ms)", spread.mean))
            rows.append((f"Median {name} (ms)", spread.median))
            rows.append((f"P99 {name} (ms)", spread.p99))
        lines = [f"{name + ':':<40} {_number(value):>12}" for name, value in rows]
        lines += [f"  {status}: {count}" for status, count in self.failures.items()]
        if not self.client_kept_up:
            lines.append("The client could not send in time: these latencies are not the server's.")
        return lines

    def _spreads(self) -> list[tuple[str, Spread]]:
        return [
            ("TTFT", self.ttft),
            ("TPOT", self.tpot),
            ("ITL", self.itl),
            ("E2EL", self.e2el),
            ("send lag", self.send_lag),
        ]


def summarize(run: Run) -> Summary:
    """The figures of one run."""
    good = [record for record in run.records if record.ok]
    times = [t - run.start_s for record in good for ts in record.token_times_s for t in ts]
    return Summary(
        successful=len(good),
        failures=dict(Counter(record.status for record in run.records if not record.ok)),
        duration_s=run.duration_s,
        input_tokens=sum(record.usage.prompt_tokens for record in good if record.usage),
        output_tokens=sum(record.num_tokens for record in good),
        peak_output_tokens_per_s=float(max(Counter(map(int, times)).values(), default=0)),
        peak_concurrent=_peak_concurrent(run),
        ttft=Spread.of([record.ttft_s for record in good if record.ttft_s is not None]),
        tpot=Spread.of([tpot_s for record in good for tpot_s in record.tpot_s]),
        itl=Spread.of([gap_s for record in good for gap_s in record.gaps_s]),
        e2el=Spread.of([record.e2el_s for record in good]),
        send_lag=Spread.of([record.sent_s - record.intended_s for record in run.records]),
    )


def _peak_concurrent(run: Run) -> int:
    """The most requests that were under way at once."""
    changes = [(record.sent_s, 1) for record in run.records]
    changes += [(record.ended_s, -1) for record in run.records]
    live = peak = 0
    for _, change in sorted(changes):  # an end sorts before a start at the same time
        live += change
        peak = max(peak, live)
    return peak


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
