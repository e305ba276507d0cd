"""DIR/summary.md and its plots, of whatever part files are in a folder of the GPU suite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.perf.kernels.case import OURS
from millrace.perf.plot import line_chart
from millrace.perf.results import FAILED, PartResult, load

FACTS = ("device", "driver_version", "clocks.sm", "torch", "triton", "commit", "seed", "time")
HEADINGS = (
    *("kernel", "case", "provider", "us (p20 to p80)"),
    *("share", "at size", "goal", "reached", "beside the fastest other"),
)
LARGE = 1000  # from here on digits behind the point say nothing
REACHED = {None: "", True: "yes", False: "**no**"}
E2E_HEADINGS = ("measurement", "case", "value", "goal, at most", "reached", "more")


@dataclass(frozen=True, slots=True)
class Plot:
    """Shares of the cases of `kernel` whose name begins with `cases`, over one of their numbers.

    The other numbers are held at the value that most of the cases have.
    """

    name: str
    part: str
    kernel: str
    cases: str
    over: str


PLOTS = (
    Plot("decode-by-context", "attention", "paged_attention", "decode b", "context"),
    Plot("decode-by-batch", "attention", "paged_attention", "decode b", "batch"),
    Plot("prefill-by-context", "attention", "paged_attention", "prefill", "context"),
    Plot("sampling-plain", "sampling", "sampling", "plain, real", "batch"),
    Plot("sampling-top-k-top-p", "sampling", "sampling", "top-k top-p, real", "batch"),
    Plot("matmul-8b-gate-up", "matmul", "matmul", "8B gate_up", "rows"),
    Plot("norm-by-hidden", "norm", "add_rms_norm", "", "hidden"),
)


def write_summary(folder: Path, parts: Sequence[str]) -> None:
    """Files of parts that never ran are missing; the summary says so."""
    lines = ["# GPU suite", ""]
    for part in parts:
        result = load(folder, part)
        if result is None:
            lines += [f"## {part}", "", "not run", ""]
            continue
        lines += [f"## {part}", "", *_head(result), "", *_body(result), ""]
        for plot in (plot for plot in PLOTS if plot.part == part):
            if _draw(folder, plot, result):
                lines += [f"![{plot.name}]({plot.name}.svg)", ""]
    (folder / "summary.md").write_text("\n".join(lines))


def _head(result: PartResult) -> list[str]:
    facts = [f"{name} {result.environment.get(name)}" for name in FACTS]
    said = f": {result.note}" if result.note else ""
    head = [f"**{result.status}**{said} ({result.seconds:.0f} s)", "", "; ".join(facts)]
    if result.environment.get("device") == "cpu":
        head += ["", "A dry run on a CPU: the times prove that the suite runs and are no speeds."]
    return head


def _body(result: PartResult) -> list[str]:
    if result.part == "correctness":
        counts = Counter(row["status"] for row in result.rows if row["status"] != "reason")
        reasons = {row["test"]: row["note"] for row in result.rows if row["status"] == "reason"}
        failed = [row["test"] for row in result.rows if row["status"] == FAILED]
        listed = [f"- {test} {reasons.get(test, '')}" for test in failed]
        return [", ".join(f"{count} {status}" for status, count in counts.items()), "", *listed]
    if result.part == "ceilings":
        units = {"copy": "bytes", "matmul": "operations"}
        return [
            f"- {row['name']} ({row['how']}), {row['work']:,d} {units[row['name']]}: "
            f"{row['rate_per_s'] / 1e12:.3f} T/s"
            for row in result.rows
        ]
    if not result.rows:
        return []
    if "facts" in result.rows[0]:
        return _table(E2E_HEADINGS, map(_e2e_cells, result.rows))
    return _table(HEADINGS, (_cells(row, result.rows) for row in result.rows))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:]]


def _e2e_cells(row: Mapping[str, Any]) -> list[str]:
    """Of a Measurement (e2e/row.py)."""
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    value = "" if row["value"] is None else f"{_number(row['value'])} {row['metric']}"
    if row["note"]:
        value = f"{row['status']}: {row['note']} {value}".replace("|", "/").strip()
    more = ", ".join(f"{name} {_number(x)}" for name, x in row["facts"].items())
    return [row["name"], row["case"], value, goal, REACHED[row["ok"]], more]


def _number(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= LARGE else f"{value:.3g}"


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [row["kernel"], row["case"], row["provider"]]
    goal = "" if row["goal"] is None else f"{row['goal']:.0%}"
    if row["median_us"] is None:
        return [*names, f"{row['status']}: {row['note']}".replace("|", "/"), "", "", goal, "", ""]
    spread = f"{row['median_us']:.2f} ({row['p20_us']:.2f} to {row['p80_us']:.2f})"
    at_size = "" if row["share_at_size"] is None else f"{row['share_at_size']:.1%}"
    beside = _beside(row, rows)
    return [*names, spread, f"{row['share']:.1%}", at_size, goal, REACHED[row["ok"]], beside]


def _beside(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How many times as fast ours is as the fastest of the others on its case."""
    same = ("kernel", "case")
    others = [
        (other["median_us"], other["provider"])
        for other in rows
        if other["median_us"] is not None
        and not other["provider"].startswith(OURS)
        and all(other[name] == row[name] for name in same)
    ]
    if row["provider"] != OURS or not others:
        return ""
    fastest_us, name = min(others)
    return f"{fastest_us / row['median_us']:.2f} x {name}"


def _draw(folder: Path, plot: Plot, result: PartResult) -> bool:
    """Write the plot's SVG; False where no row belongs to it."""
    rows = [
        row
        for row in result.rows
        if row["kernel"] == plot.kernel
        and row["case"].startswith(plot.cases)
        and row["median_us"] is not None
    ]
    if not rows:
        return False
    others = [name for name in rows[0]["axes"] if name != plot.over]
    held = {
        name: Counter(row["axes"][name] for row in rows).most_common(1)[0][0] for name in others
    }
    series: dict[str, list[tuple[float, float]]] = {}
    goal = None
    for row in rows:
        if all(row["axes"][name] == value for name, value in held.items()):
            series.setdefault(row["provider"], []).append((row["axes"][plot.over], row["share"]))
            goal = goal or row["goal"]
    words = ", ".join(f"{name} {value}" for name, value in held.items())
    title = f"{plot.kernel}, {plot.cases or 'all cases'}" + (f" ({words})" if words else "")
    text = line_chart(f"{title}: share of the ceiling", plot.over, series, goal)
    (folder / f"{plot.name}.svg").write_text(text)
    return True
