"""The plots of report.html: matplotlib's SVG for a given width, so that text stays readable on a phone.

Its colours become the style sheet's variables, which differ in dark mode; the file needs nothing from elsewhere.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.profiling.ranges import OTHER, PARTS

# matplotlib knows no variables: it draws with #0000NN, NN the place in this list, as page.mplstyle does.
VARIABLES = ("ink", "soft", "paper", "line", *PARTS, OTHER)
COLOURS = {name: f"#0000{k:02x}" for k, name in enumerate(VARIABLES, start=1)}
DATA, PEAK = COLOURS["encoder"], COLOURS["head"]
NARROW = 500  # pixels, below which text is smaller
NUMBERED, ROOMY = 9, 7  # dots that show their rank; the radius in pixels from which it fits in
WHITE = ("encoder", "head", "solver")  # parts on whose colour white is easier to read than black
UNITS = {"": 1, "giga": 1e9, "mega": 1e6}


class Number(float):
    """A number with three significant digits and without an exponent: 0.0123, 1.23, 123, 12300.

    f"{Number(5e9):giga}" is in another unit, see UNITS; other formats are those of a float.
    """

    def __format__(self, spec: str) -> str:
        if spec not in UNITS:
            return super().__format__(spec)
        value = self / UNITS[spec]
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{float(value):,.{digits}f}"


def _plot(width: int, height: int, title: str, x_label: str, y_label: str, draw: Callable[[Axes], None]) -> str:
    """An inline SVG of width x height pixels; y_label stands above the axis. What has a gid "tip:.." has a tooltip."""
    with rc_context({"svg.hashsalt": f"{title}{width}"}, Path(__file__).with_name("page.mplstyle")):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(title=y_label, xlabel=x_label)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().partition("<svg")[2]
    svg = re.sub(r' (xmlns(:xlink)?|id="[a-z]+_)[^ >]*', "", svg)  # a page has no namespaces, and needs no such names
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda found: f"var(--{VARIABLES[int(found[1], 16) - 1]})", svg)
    return f'<svg role="img" aria-label="{title}"{svg}'.replace('id="tip:', 'data-tip="')


def timeline(latency: Mapping[str, Any], width: int) -> str:
    """Milliseconds of every step, one line per trajectory, and the quantiles."""
    runs, quantiles = latency["trajectories"], latency["step_ms"]

    def draw(axes: Axes) -> None:
        for run in runs:
            steps = np.arange(1, len(run["steps_ms"]) + 1)
            axes.plot(steps, run["steps_ms"], color=DATA, alpha=0.75, marker="." if len(steps) == 1 else "")
        for name, dashes in (("p50", "-"), ("p90", (0, (7, 4))), ("p99", (0, (2, 3)))):
            label = f"{name} {Number(quantiles[name])}"
            axes.axhline(quantiles[name], color=COLOURS["ink"], ls=dashes, alpha=0.75, label=label)
        value, step = max((value, k + 1) for run in runs for k, value in enumerate(run["steps_ms"]))
        axes.plot(step, value, "o", color=PEAK, label=f"max {Number(value)}")
        axes.set(ylim=(0, value * 1.1), xlim=(1, max(2, len(runs[0]["steps_ms"]))))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4 if width > NARROW else 2)

    return _plot(width, 300, "Latency of every step", "step", "ms per step", draw)


def memory(points: Sequence[tuple[float, float]], x_label: str, y_label: str, width: int, steps: bool) -> str:
    """Bytes over time as MiB; `steps` holds a value until the next."""
    xs, held = np.array(points, dtype=float).T
    held = held / 2**20
    top = int(held.argmax())

    def draw(axes: Axes) -> None:
        axes.fill_between(xs, held, step="post" if steps else None, fc=(DATA, 0.16), ec=DATA)
        axes.plot(xs[top], held[top], "o", color=PEAK)
        side, align = (7, "left") if xs[top] < xs.mean() else (-7, "right")
        place = {"xytext": (side, 4), "textcoords": "offset points", "ha": align}
        axes.annotate(f"peak {Number(held[top])} MiB", (xs[top], held[top]), weight="bold", **place)
        axes.set(ylim=(0, held[top] * 1.18 or 1.0), xlim=(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1))

    return _plot(width, 240, y_label, x_label, y_label, draw)


def roofline(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any], width: int) -> str:
    """Operators as dots of area ~ time under the measured roofs, the larger ones numbered by rank.

    rows: operators with `rank`, `tip`, `part`, `intensity` (flop per byte) and `gflop_per_s`.
    """
    products = {"matrix product": ceilings["matmul_gflop_per_s"], "convolution": ceilings["conv_gflop_per_s"]}
    copies = {"copy in cache": ceilings["cached_copy_gb_per_s"], "copy": ceilings["copy_gb_per_s"]}
    xs, ys = ([row[key] for row in rows] for key in ("intensity", "gflop_per_s"))
    top, small = max(products.values()), 0.75 if width < NARROW else 1.0
    x_bounds = (min(xs) / 2, max(max(xs) * 3, top / copies["copy"] * 4))
    y_bounds = (min(ys) / 2.5, max(top, *ys) * 4)

    def draw(axes: Axes) -> None:
        soft = {"color": COLOURS["soft"]}
        axes.set(xscale="log", yscale="log", xlim=x_bounds, ylim=y_bounds)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        for rate in products.values():
            axes.plot([rate / max(copies.values()), x_bounds[1]], [rate, rate], lw=1.6, **soft)
        by_rate = sorted(products, key=lambda name: -products[name])
        text = "\n".join(f"{name} {products[name]:,.0f} GFLOP/s" for name in by_rate)
        axes.text(x_bounds[1], top * 1.2, text, ha="right", va="bottom", size=12 * small, **soft)
        axes.figure.draw_without_rendering()  # the layout, which says how steep a roof is
        (left, low), (right, high) = axes.transData.transform([(1, 1), (10, 10)])
        slope = {"rotation": math.degrees(math.atan2(high - low, right - left)), "rotation_mode": "anchor"}
        # Along the roofs, above the one and below the other, near the upper ends, where few operators are.
        for (name, rate), align, shift in zip(copies.items(), ("bottom", "top"), (0.7, 0.6), strict=True):
            axes.plot([x_bounds[0], top / rate], [x_bounds[0] * rate, top], lw=1.6, **soft)
            place = {"ha": "right", "va": align, "size": 12 * small}
            axes.text(top / rate * 0.7, top * shift, f"{name} {Number(rate)} GB/s", **place, **slope, **soft)
        for row in sorted(rows, key=lambda row: -row["ms"]):
            radius = max(3.0, min(20.0, 42 * math.sqrt(row["share"])) * small)
            at = (row["intensity"], row["gflop_per_s"])
            colours = {"color": COLOURS[row["part"]], "ec": COLOURS["paper"], "lw": 1, "zorder": 3}
            axes.scatter(*at, s=(2 * radius) ** 2, **colours).set_gid(f"tip:{row['tip']}")
            if row["rank"] <= NUMBERED:
                font = {"size": 11, "weight": "bold", "ha": "center", "va": "center_baseline", "zorder": 4}
                place = {"xytext": (radius + 5, -radius), "textcoords": "offset points"}
                if radius >= ROOMY:
                    place["xytext"] = (0, 0)
                    font["color"] = "white" if row["part"] in WHITE else "#0b0f13"
                axes.annotate(row["rank"], at, **place, **font).set_gid(f"tip:{row['tip']}")

    return _plot(width, 440, "Operators under the measured ceilings", "flop per byte", "GFLOP/s", draw)
