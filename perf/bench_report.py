"""What `millrace bench` has measured: levels of streams, the peers', and what is said of them.

`bench.py` fills these and prints them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from millrace.perf.loadgen.report import Spread, Summary
from millrace.perf.loadgen.tenants import tenant_lines


@dataclass(slots=True)
class PeerLevel:
    """All repetitions of one batch by one peer."""

    name: str
    streams: int
    rates: list[float] = field(default_factory=list)  # output tokens a second

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds of a server during one run."""

    front_end_s: float  # its process: gRPC, tokenizing, metrics
    scheduler_s: float  # of the core: scheduling, applying, publishing (it reports these itself)
    total_s: float  # of all its processes

    @property
    def overhead(self) -> float:
        """The share that is not the model's."""
        return (self.front_end_s + self.scheduler_s) / self.total_s if self.total_s else 0.0


@dataclass(slots=True)
class Level:
    """All repetitions of one level."""

    streams: int
    summaries: list[Summary] = field(default_factory=list)
    tenants: list[dict[str, Summary]] = field(default_factory=list)  # by name, of each repetition
    cpu: list[CpuUse] = field(default_factory=list)  # empty for a server of somebody else's

    @property
    def rate(self) -> float:
        """Median output tokens a second."""
        return statistics.median(summary.output_tokens_per_s for summary in self.summaries)

    @property
    def overhead(self) -> float | None:
        return statistics.median(use.overhead for use in self.cpu) if self.cpu else None


def result_of(levels: list[Level], peer_levels: Sequence[PeerLevel]) -> dict[str, Any]:
    """Everything measured, for the JSON line."""
    base = min(levels, key=lambda level: level.streams)
    ours = {level.streams: level.rate for level in levels}
    return {
        "levels": [
            {
                "streams": level.streams,
                "tokens_per_s": level.rate,
                "scaling": level.rate / base.rate,
                "overhead": level.overhead,
                "runs": [asdict(summary) for summary in level.summaries],
                "tenants": [
                    {name: asdict(summary) for name, summary in shares.items()}
                    for shares in level.tenants
                ],
                "cpu": [asdict(use) for use in level.cpu],
            }
            for level in levels
        ],
        "base_streams": base.streams,
        "peers": [
            {
                "name": peer.name,
                "streams": peer.streams,
                "tokens_per_s": peer.rate,
                "ratio": ours[peer.streams] / peer.rate if peer.streams in ours else None,
                "runs": peer.rates,
            }
            for peer in peer_levels
        ],
    }


def findings(result: dict[str, Any]) -> list[str]:
    """The ratios, in words."""
    base = result["base_streams"]
    lines = []
    for level in result["levels"]:
        if level["streams"] != base:
            lines.append(f"{level['streams']} streams to {base}: {level['scaling']:.2f} x tokens/s")
        if level["overhead"] is not None:
            share = f"{level['overhead']:.1%} of the server's CPU time"
            lines.append(f"{level['streams']} streams: front end and scheduler take {share}")
    for peer in result["peers"]:
        line = f"{peer['name']} at {peer['streams']} streams: {peer['tokens_per_s']:.1f} tokens/s"
        ratio = peer["ratio"]
        lines.append(line + (f"; Millrace is {ratio:.2f} x as fast" if ratio is not None else ""))
    return lines


def tenant_findings(levels: list[Level]) -> Iterator[str]:
    """What each tenant got, in each repetition: they are few, and no median hides an outlier."""
    for level in levels:
        for repeat, shares in enumerate(level.tenants, 1):
            for line in tenant_lines(shares):
                yield f"{level.streams} streams, repetition {repeat}, {line}"


def table_of(levels: list[Level]) -> Table:
    """Medians over the repetitions."""
    table = Table(title="Medians; latencies in ms, p50 / p99", box=box.SIMPLE)
    for name in ("streams", "tokens/s (min-max)", "TTFT", "ITL", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    for level in levels:
        rates = [summary.output_tokens_per_s for summary in level.summaries]
        table.add_row(
            str(level.streams),
            f"{level.rate:.1f} ({min(rates):.1f}-{max(rates):.1f})",
            _spread([summary.ttft for summary in level.summaries]),
            _spread([summary.itl for summary in level.summaries]),
            _spread([summary.tpot for summary in level.summaries]),
        )
    return table


def _spread(spreads: list[Spread]) -> str:
    median = statistics.median(spread.median for spread in spreads)
    p99 = statistics.median(spread.p99 for spread in spreads)
    return f"{median:.1f} / {p99:.1f}"
