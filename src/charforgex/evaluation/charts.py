"""Charts as inline SVG that take the page's colours. Names in them are escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from charforgex.pages import text

WIDTH, HEIGHT = 360, 210  # of a chart, in its own units
WIDE = (740, 340)
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 32  # the plot's margins
LETTER = 6.1  # pixels of one letter, about
LABEL = 30  # letters of a name in a chart


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Dot:
    """A contestant among others: `x` and `y` each with an interval or none, and how it is shown."""

    name: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]
    kind: str = ""  # "front", "best", "base"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most`."""
    if high <= low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) < most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def span(numbers: Sequence[float | None]) -> tuple[float, float]:
    """From the smallest to the largest, with some air; of one number, around it."""
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    low, high = min(known), max(known)
    air = 0.06 * (high - low) or 0.05 * abs(low) or 0.5
    return low - air, high + air


class Plot:
    """Axes, and what has been drawn on them."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_title: str, y_title: str = "", size: tuple[int, int] = (WIDTH, HEIGHT)
    ):
        self.x, self.y, (self.width, self.height) = x, y, size
        width, height = size
        self.parts: list[str] = []
        for value in ticks(*y):
            at = self.down(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self.write(LEFT - 5, at + 3.5, f"{value:.4g}", "end")
        for value in ticks(*x):
            self.write(self.across(value), height - BOTTOM + 14, f"{value:.6g}", "middle")
        self.write(width - RIGHT, height - 4, x_title, "end")
        self.write(2, 9, y_title)

    def across(self, x: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (x - self.x[0]) / (self.x[1] - self.x[0])

    def down(self, y: float) -> float:
        return self.height - BOTTOM - (self.height - BOTTOM - TOP) * (y - self.y[0]) / (self.y[1] - self.y[0])

    def write(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(words)}</text>')

    def line(self, one: tuple[float, float], other: tuple[float, float], kind: str) -> None:
        (x1, y1), (x2, y2) = ((self.across(x), self.down(y)) for x, y in (one, other))
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> None:
        told = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)
        self.parts.append(f'<{"polygon" if closed else "polyline"} class="{kind}" points="{told}"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 3.2, words: str = "") -> None:
        title = f"<title>{text(words)}</title>" if words else ""
        self.parts.append(f'<circle class="{kind}" cx="{self.across(x):.1f}" cy="{self.down(y):.1f}" r="{radius}">{title}</circle>')

    def svg(self, words: str) -> Markup:
        inside = "".join(self.parts)
        return Markup(  # every text in it went through `text`
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{text(words)}">{inside}</svg>'
        )


def curves(
    series: Mapping[str, Sequence[Point]], lines: Mapping[str, float | None], x_title: str, words: str, marked: float | None = None
) -> Markup:
    """One curve a name with its band of 95 %, and level lines such as floor and ceiling. `marked` is an x that stands out."""
    levels = {name: value for name, value in lines.items() if value is not None}
    points = [point for found in series.values() for point in found]
    numbers = [number for point in points for number in (point.y, point.low, point.high)]
    plot = Plot(span([point.x for point in points]), span([*numbers, *levels.values()]), x_title)
    if marked is not None:
        plot.line((marked, plot.y[0]), (marked, plot.y[1]), "marked")
    for value in levels.values():
        plot.line((plot.x[0], value), (plot.x[1], value), "level")
    for baseline, names in _apart({name: plot.down(value) - 3 for name, value in levels.items()}):
        plot.write(WIDTH - RIGHT, baseline, names, "end")
    for index, (name, found) in enumerate(series.items()):
        kind, found = f"s{index % 6}", sorted(found, key=lambda point: point.x)
        banded = [point for point in found if point.low is not None and point.high is not None]
        if len(banded) > 1:
            edge = [(point.x, point.low) for point in banded] + [(point.x, point.high) for point in reversed(banded)]
            plot.path(edge, f"band {kind}", closed=True)
        plot.path([(point.x, point.y) for point in found], f"curve {kind}")
        for point in found:
            plot.dot(point.x, point.y, f"point {kind}", words=f"{name}, {x_title} {point.x:g}: {point.y:.4g}")
    return plot.svg(words)


def _apart(baselines: Mapping[str, float]) -> list[tuple[float, str]]:
    """Names of lines that are too near each other to be written apart, as one text."""
    found: list[tuple[float, list[str]]] = []
    for name, baseline in sorted(baselines.items(), key=lambda item: item[1]):
        if found and baseline - found[-1][0] < 11:
            found[-1][1].append(name)
        else:
            found.append((baseline, [name]))
    return [(baseline, ", ".join(names)) for baseline, names in found]


def scatter(dots: Sequence[Dot], x_title: str, y_title: str) -> Markup:
    """Contestants by two metrics of which more is better, whiskers of 95 %, and the front that none beats as a stair."""
    plot = Plot(
        span([number for dot in dots for number in dot.x]), span([number for dot in dots for number in dot.y]), f"{x_title} →",
        f"{y_title} ↑", WIDE,
    )  # fmt: skip
    front = sorted((dot.x[0], dot.y[0]) for dot in dots if dot.kind in ("front", "best"))
    stair = [corner for one, after in pairwise(front) for corner in (one, (one[0], after[1]))] + front[-1:]
    if len(front) > 1:
        plot.path(stair, "front")
    for dot in dots:
        for axis, (_, low, high) in enumerate((dot.x, dot.y)):
            if low is not None and high is not None:
                ends = [(low, dot.y[0]), (high, dot.y[0])] if axis == 0 else [(dot.x[0], low), (dot.x[0], high)]
                plot.line(*ends, "whisker")
    taken: list[tuple[float, float, float]] = []  # left, right, baseline of names already written
    order = {"best": 0, "front": 1, "base": 2}
    for dot in sorted(dots, key=lambda dot: order.get(dot.kind, 3)):
        plot.dot(dot.x[0], dot.y[0], f"dot {dot.kind}", 6.5 if dot.kind == "best" else 4.5, words=dot.name)
        name = dot.name if len(dot.name) <= LABEL else f"{dot.name[: LABEL - 1]}…"
        x, y, long = plot.across(dot.x[0]), plot.down(dot.y[0]), LETTER * len(name)
        places = [(x + 9, y - 7, "start"), (x - 9, y - 7, "end"), (x + 9, y + 14, "start"), (x - 9, y + 14, "end")]
        for at, baseline, anchor in places:
            left = at if anchor == "start" else at - long
            free = all(left > right or left + long < start or abs(baseline - other) > 11 for start, right, other in taken)
            if left >= LEFT and left + long <= plot.width and TOP <= baseline <= plot.height - BOTTOM and free:
                taken.append((left, left + long, baseline))
                plot.write(at, baseline, name, anchor, "name strong" if dot.kind == "best" else "name")
                break  # a name without a free place is in the dot's own title and in the tables
    return plot.svg(f"{y_title} against {x_title}; the tables have all numbers")
