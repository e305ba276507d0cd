"""Charts of lines as SVG, without a library: shares of a ceiling, times, any curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 160, 40, 50  # margins; the legend stands in the right one
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]
"""(x, y) -> its place in the picture."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The upward one. Linear from `low` = 0, logarithmic from any other."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: Callable[[float], str]

    def share(self, y: float) -> float:
        """How far up a value stands; what is outside stands at the edge."""
        y = min(max(y, self.low), self.high)
        if self.low == 0.0:
            return y / self.high
        return math.log(y / self.low) / math.log(self.high / self.low)


SHARES = Axis(0.0, 1.1, (0.0, 0.25, 0.5, 0.75, 1.0), lambda share: f"{share:.0%}")


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Points],
    goal: float | None = None,
    axis: Axis = SHARES,
) -> str:
    """`series` maps a name to (x, y) points, x positive on a logarithmic axis to base 2."""
    xs = sorted({x for points in series.values() for x, _ in points})
    low, high = math.log2(xs[0]), math.log2(xs[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        along = (math.log2(x) - low) / (high - low) if high > low else 0.5
        plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + along * plot_width, HEIGHT - BOTTOM - axis.share(y) * plot_height

    body = [_text(WIDTH / 2, 22, title, "middle", 15), *_axes(xs, x_label, axis, at)]
    if goal is not None:
        (x1, y), (x2, _) = at(xs[0], goal), at(xs[-1], goal)
        body.append(_line(x1, y, x2, y, "#666", "6 4"))
        body.append(_text(WIDTH - RIGHT + 8, y + 4, f"goal {axis.label(goal)}"))
    return _whole([*body, *_curves(series, at)])


def curve_chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Points], num_ticks: int = 6
) -> str:
    """Curves over linear axes from zero; the largest x and y of all points are in the picture."""
    points = [point for named in series.values() for point in named]
    x_step, y_step = (_tick(max(values), num_ticks) for values in zip(*points, strict=True))
    x_end = x_step * math.ceil(max(x for x, _ in points) / x_step)
    y_end = y_step * math.ceil(max(y for _, y in points) / y_step)
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + plot_width * x / x_end, HEIGHT - BOTTOM - plot_height * y / y_end

    body = [_text(WIDTH / 2, 22, title, "middle", 15)]
    for index in range(round(y_end / y_step) + 1):
        y = at(0.0, index * y_step)[1]
        body.append(_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"))
        body.append(_text(LEFT - 8, y + 4, f"{index * y_step:g}", "end"))
    for index in range(round(x_end / x_step) + 1):
        x = at(index * x_step, 0.0)[0]
        body.append(_line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5, "#333"))
        body.append(_text(x, HEIGHT - BOTTOM + 20, f"{index * x_step:g}", "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"))
    body.append(_text(LEFT, TOP - 6, y_label))
    return _whole([*body, *_curves(series, at)])


def _tick(largest: float, num_ticks: int) -> float:
    """A round step, 1, 2 or 5 times a power of ten, of which at most `num_ticks` are needed."""
    power: float = 10.0 ** math.floor(math.log10(largest / num_ticks))
    return next(power * step for step in (1, 2, 5, 10) if power * step * num_ticks >= largest)


def _curves(series: Mapping[str, Points], at: Place) -> list[str]:
    """Each as a line with its points, and its name in the legend."""
    body = []
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [at(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = HEIGHT - BOTTOM - 18 * (len(series) - i)
        body.append(_line(WIDTH - RIGHT + 30, y, WIDTH - RIGHT + 50, y, colour))
        body.append(_text(WIDTH - RIGHT + 56, y + 4, name))
    return body


def _whole(body: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    white = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([f"{head} {style}>", white, *body, "</svg>"]) + "\n"


def _axes(xs: Sequence[float], x_label: str, axis: Axis, at: Place) -> list[str]:
    """Both axes with their labels and a faint line at each tick."""
    found = []
    for tick in axis.ticks:
        y = at(xs[0], tick)[1]
        found.append(_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"))
        found.append(_text(LEFT - 8, y + 4, axis.label(tick), "end"))
    for x in xs:
        place, bottom = at(x, 0.0)
        found.append(_line(place, bottom, place, bottom + 5, "#333"))
        found.append(_text(place, bottom + 20, f"{x:,.0f}" if x >= 1000 else f"{x:g}", "middle"))
    found.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"))
    return found


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line {ends} stroke="{colour}" stroke-width="1.5"{dashed}/>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(words)}</text>"
