"""The plots of report.html as SVG, drawn for a given width so that text stays readable on a phone.

Colours and fonts come from the page's style sheet by class; the file needs nothing from elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

CHARACTER = 7.4  # pixels that a bold 12 px label needs per character, on average
NARROW = 500  # below this width labels are short
Box = tuple[float, float, float, float]  # left, top, right, bottom


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 12300."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved apart to at least `gap`, in order, within [low, high] where they fit."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    floor = low
    for k in order:
        moved[k] = max(moved[k], floor)
        floor = moved[k] + gap
    ceiling = high
    for k in reversed(order):
        moved[k] = min(moved[k], ceiling)
        ceiling = moved[k] - gap
    return moved


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / max(1, count) or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Plot:
    """Axes of width x height pixels over x in (low, high) and y in (low, high), linear or logarithmic."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    log: bool = False
    right: int = 16
    parts: list[str] = field(default_factory=list)
    left: int = 52
    top: int = 26
    bottom: int = 42

    def _scale(self, value: float, bounds: tuple[float, float]) -> float:
        low, high = bounds
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low or 1.0)

    def at_x(self, value: float) -> float:
        return self.left + self._scale(value, self.x) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        return self.height - self.bottom - self._scale(value, self.y) * (self.height - self.top - self.bottom)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points in data coordinates."""
        steps = " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in points)
        self.add(f'<polyline points="{steps}" class="{kind}"/>')

    def ticks(self, bounds: tuple[float, float], room: float) -> list[float]:
        if not self.log:
            return linear_ticks(*bounds, count=max(2, int(room / 70)))
        decades = range(math.ceil(math.log10(bounds[0]) - 1e-9), math.floor(math.log10(bounds[1]) + 1e-9) + 1)
        return [10.0**decade for decade in decades]

    def svg(self, title: str) -> str:
        """The finished drawing, grid and axes below what was added."""
        right, bottom = self.width - self.right, self.height - self.bottom
        grid = []
        for value in self.ticks(self.y, bottom - self.top):
            y = self.at_y(value)
            grid.append(f'<line x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            label = escape(f"{value:,g}")
            grid.append(f'<text x="{self.left - 7}" y="{y + 4:.1f}" text-anchor="end" class="tick">{label}</text>')
        for value in self.ticks(self.x, right - self.left):
            x = self.at_x(value)
            grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{bottom}" class="grid"/>')
            label = escape(f"{value:,g}")
            grid.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle" class="tick">{label}</text>')
        grid.append(f'<text x="{right}" y="{self.height - 6}" text-anchor="end" class="axis">{self.x_label}</text>')
        grid.append(f'<text x="2" y="14" class="axis">{self.y_label}</text>')
        body = "".join((*grid, *self.parts))
        head = f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img"'
        return f'{head} aria-label="{escape(title)}"><title>{escape(title)}</title>{body}</svg>'


def timeline(latency: dict[str, Any], width: int) -> str:
    """Milliseconds of every step, one line per trajectory, and the quantiles."""
    runs, quantiles = latency["trajectories"], latency["step_ms"]
    steps = len(runs[0]["steps_ms"])
    plot = Plot(width, 300, (1, max(2, steps)), (0, quantiles["max"] * 1.1), "step", "ms per step", right=92)
    for run in runs:
        values = run["steps_ms"]
        plot.path([(k + 1, value) for k, value in enumerate(values)], "trajectory")
        if len(values) == 1:
            plot.add(f'<circle cx="{plot.at_x(1):.1f}" cy="{plot.at_y(values[0]):.1f}" r="3" class="extreme"/>')
    names = ("p50", "p90", "p99", "max")
    places = [plot.at_y(quantiles[name]) + 4 for name in names]
    edge = width - plot.right
    for name, place in zip(names, spread(places, 15, 20, 260), strict=True):
        y = plot.at_y(quantiles[name])
        if name != "max":
            plot.path([(1, quantiles[name]), (plot.x[1], quantiles[name])], f"quantile {name}")
        plot.add(f'<line x1="{edge}" y1="{y:.1f}" x2="{edge + 9}" y2="{place - 4:.1f}" class="leader"/>')
        plot.text(edge + 12, place, f"{name} {number(quantiles[name])}", "mark")
    slowest = max(((value, k + 1) for run in runs for k, value in enumerate(run["steps_ms"])))
    plot.add(f'<circle cx="{plot.at_x(slowest[1]):.1f}" cy="{plot.at_y(slowest[0]):.1f}" r="3.5" class="extreme"/>')
    return plot.svg("Latency of every step")


def memory(points: Sequence[tuple[float, float]], x_label: str, y_label: str, width: int, steps: bool) -> str:
    """Bytes over time as MiB; `steps` holds a value until the next."""
    values = [(x, held / 2**20) for x, held in points]
    drawn = values
    if steps:
        turns = [((after[0], before[1]), after) for before, after in pairwise(values)]
        drawn = [values[0], *(corner for turn in turns for corner in turn)]
    peak = max(values, key=lambda value: value[1])
    plot = Plot(width, 240, (values[0][0], values[-1][0] or 1.0), (0, peak[1] * 1.18 or 1.0), x_label, y_label)
    base = plot.at_y(0)
    corners = " ".join(f"{plot.at_x(x):.1f},{plot.at_y(y):.1f}" for x, y in drawn)
    first, last = plot.at_x(drawn[0][0]), plot.at_x(drawn[-1][0])
    plot.add(f'<polygon points="{first:.1f},{base:.1f} {corners} {last:.1f},{base:.1f}" class="area"/>')
    plot.path(drawn, "trajectory")
    x, y = plot.at_x(peak[0]), plot.at_y(peak[1])
    plot.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="extreme"/>')
    anchor = "start" if x < width / 2 else "end"
    plot.text(x + (7 if anchor == "start" else -7), y - 6, f"peak {number(peak[1])} MiB", "mark", anchor)
    return plot.svg(y_label)


def roofline(rows: Sequence[dict[str, Any]], ceilings: dict[str, Any], width: int, label: Callable[..., str]) -> str:
    """Operators as dots of area ~ time under the measured roofs; labels of the largest, placed without overlaps.

    rows: operators with `rank`, `part`, `intensity` (flop per byte) and `gflop_per_s`; label(row, narrow) its text.
    """
    matrix, conv = ceilings["matmul_gflop_per_s"], ceilings["conv_gflop_per_s"]
    copies = (ceilings["copy_gb_per_s"], ceilings["cached_copy_gb_per_s"])
    roof = max(matrix, conv, *(row["gflop_per_s"] for row in rows))
    xs = [row["intensity"] for row in rows]
    ys = [row["gflop_per_s"] for row in rows]
    x_bounds = (min(xs) / 2, max(max(xs) * 3, roof / copies[0] * 4))
    plot = Plot(width, 440, x_bounds, (min(ys) / 2.5, roof * 4), "flop per byte", "GFLOP/s", log=True, right=14)
    taken: list[Box] = []
    texts: list[Box] = []
    top = plot.at_y(max(matrix, conv))
    for above, (rate, what) in enumerate(sorted(((matrix, "matrix product"), (conv, "convolution")))):
        plot.path([(rate / max(copies), rate), (x_bounds[1], rate)], "roof")
        text = f"{what} {rate:,.0f} GFLOP/s"
        y = top - 7 - 15 * above
        plot.text(width - plot.right - 2, y, text, "rooftext", "end")
        texts.append((width - plot.right - len(text) * CHARACTER, y - 11, width - plot.right, y + 3))
    for rate, what in zip(copies, ("copy", "copy in cache"), strict=True):
        low = max(x_bounds[0], plot.y[0] / rate)
        plot.path([(low, low * rate), (max(matrix, conv) / rate, max(matrix, conv))], "roof")
        x, y = plot.at_x(low), plot.at_y(low * rate)
        x2, y2 = plot.at_x(max(matrix, conv) / rate), plot.at_y(max(matrix, conv))
        angle = math.degrees(math.atan2(y2 - y, x2 - x))
        text = f"{what} {number(rate)} GB/s"
        # Near its upper end, where few operators are: above the line for the faster, below for the slower.
        reach = math.hypot(x2 - x, y2 - y)
        along = max(6.0, reach - len(text) * CHARACTER - 14)
        tx, ty = x + (x2 - x) * along / reach, y + (y2 - y) * along / reach
        shift = -7 if rate == max(copies) else 15
        plot.add(
            f'<text x="{tx:.1f}" y="{ty:.1f}" class="rooftext" dy="{shift}" '
            f'transform="rotate({angle:.1f} {tx:.1f} {ty:.1f})">{escape(text)}</text>'
        )
        for k in range(12):
            part = (along + (reach - along) * k / 12) / reach
            px, py = x + (x2 - x) * part, y + (y2 - y) * part + shift - 4
            texts.append((px - 7, py - 8, px + 7, py + 8))
    narrow = width < NARROW
    dots = []
    for row in sorted(rows, key=lambda row: -row["ms"]):
        radius = max(3.0, min(20.0, 42 * math.sqrt(row["share"])) * (0.7 if narrow else 1.0))
        dots.append((plot.at_x(row["intensity"]), plot.at_y(row["gflop_per_s"]), radius, row))
    for x, y, radius, row in dots:
        plot.add(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="dot {row["part"]}" '
            f'data-tip="{escape(row["tip"], quote=True)}"/>'
        )
        taken.append((x - radius, y - radius, x + radius, y + radius))
    for x, y, radius, row in dots[: 6 if narrow else 9]:
        if not _label(plot, x, y, radius, label(row, narrow), taken, texts):
            _label(plot, x, y, radius, label(row, True), taken, texts)
    return plot.svg("Operators under the measured ceilings")


def _label(plot: Plot, x: float, y: float, radius: float, text: str, dots: Sequence[Box], texts: list[Box]) -> bool:
    """Write the text near a dot where nothing else is, with a leader that crosses no text; False if nowhere."""
    wide = len(text) * CHARACTER
    for distance in (4, 16, 30, 46, 64, 86, 110):
        for degrees in (0, 180, 35, -35, 145, -145, 70, -70, 110, -110, 90, -90):
            reach = radius + distance
            dx, dy = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))
            px, py = x + reach * dx, y + reach * dy
            left = px - wide if abs(degrees) > 90 else px - wide / 2 if abs(degrees) == 90 else px
            box = (left - 3, py - 9, left + wide + 3, py + 7)
            inside = plot.left < box[0] and box[2] < plot.width and plot.top < box[1] and box[3] < plot.at_y(plot.y[0])
            clear = not any(_overlap(box, other) for other in (*dots, *texts))
            along = ((x + dx * far, y + dy * far) for far in range(int(radius), int(reach), 4))
            free = not any(_overlap((a, b, a, b), other) for a, b in along for other in texts)
            if inside and clear and free:
                texts.append(box)
                if distance > 4:
                    end = py - 9 * dy if abs(degrees) == 90 else py
                    plot.add(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{px:.1f}" y2="{end:.1f}" class="leader"/>')
                plot.text(left, py + 4, text, "mark")
                return True
    return False


def _overlap(a: Box, b: Box) -> bool:
    return a[2] >= b[0] and a[0] <= b[2] and a[3] >= b[1] and a[1] <= b[3]
