"""The plots of report.html: matplotlib's SVG, whose colours become the style sheet's variables, as dark mode needs."""

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

from bench.profiling.trace import OTHER, PARTS

# matplotlib knows no variables: it draws with #0000NN, NN the place in this list, as page.mplstyle does.
VARIABLES = ("ink", "soft", "paper", "line", *PARTS, OTHER)
COLOURS = {name: f"#0000{k:02x}" for k, name in enumerate(VARIABLES, start=1)}
DATA, PEAK, SOFT = COLOURS["encoder"], COLOURS["head"], COLOURS["soft"]
WIDTH = 860  # pixels; the page scales a plot, and scrolls it on narrow screens
NUMBERED, ROOMY = 9, 7  # dots that show their rank; the radius in pixels from which it fits in
WHITE = ("encoder", "head", "solver")  # parts on whose colour white is easier to read than black
UNITS = {"": 1, "giga": 1e9, "mega": 1e6}


class Number(float):
    """A number with three significant digits and without an exponent: 0.0123, 1.23, 123, 12300. nan is nothing.

    f"{Number(5e9):giga}" is in another unit, see UNITS; other formats are those of a float.
    """

    def __format__(self, spec: str) -> str:
        if spec not in UNITS or math.isnan(self):
            return "" if math.isnan(self) else super().__format__(spec)
        value = self / UNITS[spec]
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{float(value):,.{digits}f}"


def _plot(height: int, label: str, draw: Callable[[Axes], Any], width: int = WIDTH, **labels: Any) -> str:
    """An inline SVG of width x height pixels. What has a gid "tip:.." has a tooltip. labels: of `Axes.set`."""
    with rc_context({"svg.hashsalt": label}, Path(__file__).with_name("page.mplstyle")):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set(**labels)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().partition("<svg")[2]
    svg = re.sub(r' (xmlns(:xlink)?|id="[a-z]+_)[^ >]*', "", svg)  # a page has no namespaces, and needs no such names
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda found: f"var(--{VARIABLES[int(found[1], 16) - 1]})", svg)
    return f'<div class="scroll"><svg role="img" aria-label="{label}"{svg}</div>'.replace('id="tip:', 'data-tip="')


def timeline(latency: Mapping[str, Any]) -> str:
    """Milliseconds of every step, one line per trajectory, and the quantiles."""
    runs, quantiles = latency["trajectories"], latency["step_ms"]
    steps = np.arange(1, len(runs[0]["steps_ms"]) + 1)
    most, step = max((value, k + 1) for run in runs for k, value in enumerate(run["steps_ms"]))

    def draw(axes: Axes) -> None:
        for run in runs:
            axes.plot(steps, run["steps_ms"], color=DATA, alpha=0.75, marker="." if len(steps) == 1 else "")
        for name, dashes in (("p50", "-"), ("p90", (0, (7, 4))), ("p99", (0, (2, 3)))):
            label = f"{name} {Number(quantiles[name])}"
            axes.axhline(quantiles[name], color=COLOURS["ink"], ls=dashes, alpha=0.75, label=label)
        axes.plot(step, most, "o", color=PEAK, label=f"max {Number(most)}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)

    bounds = {"ylim": (0, most * 1.1), "xlim": (1, max(2, len(steps)))}
    return _plot(260, "Latency of every step", draw, title="ms per step", xlabel="step", **bounds)


def memory(points: Sequence[tuple[float, float]], x_label: str, y_label: str, steps: bool) -> str:
    """Bytes over time as MiB; `steps` holds a value until the next."""
    xs, held = np.array(points, dtype=float).T
    held = held / 2**20
    top = int(held.argmax())

    def draw(axes: Axes) -> None:
        axes.fill_between(xs, held, step="post" if steps else None, fc=(DATA, 0.16), ec=DATA)
        axes.plot(xs[top], held[top], "o", color=PEAK, label=f"peak {Number(held[top])} MiB")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))

    bounds = {"ylim": (0, held[top] * 1.1 or 1.0), "xlim": (xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1)}
    return _plot(230, y_label, draw, WIDTH // 2, title=y_label, xlabel=x_label, **bounds)


def roofline(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> str:
    """Operators as dots of area ~ time under the measured roofs, the larger ones numbered by rank.

    rows: operators with `rank`, `tip`, `part`, `intensity` (flop per byte) and `gflop_per_s`.
    """
    products = {"matrix product": ceilings["matmul_gflop_per_s"], "convolution": ceilings["conv_gflop_per_s"]}
    copies = {"copy in cache": ceilings["cached_copy_gb_per_s"], "copy": ceilings["copy_gb_per_s"]}
    xs, ys = ([row[key] for row in rows] for key in ("intensity", "gflop_per_s"))
    top = max(products.values())
    bounds = np.array([min(xs) / 2, max(max(xs) * 3, top / copies["copy"] * 4)])

    def draw(axes: Axes) -> None:
        for (name, rate), dashes in zip(products.items(), ("-", (0, (7, 4))), strict=True):
            ends = [rate / max(copies.values()), bounds[1]]
            axes.plot(ends, [rate, rate], ls=dashes, color=SOFT, lw=1.6, label=f"{name} {rate:,.0f} GFLOP/s")
        for (name, rate), dashes in zip(copies.items(), ((0, (2, 3)), (0, (7, 3, 2, 3))), strict=True):
            ends = np.array([bounds[0], top / rate])
            axes.plot(ends, ends * rate, ls=dashes, color=SOFT, lw=1.6, label=f"{name} {Number(rate)} GB/s")
        for row in sorted(rows, key=lambda row: -row["ms"]):
            radius = max(3.0, min(20.0, 42 * math.sqrt(row["share"])))
            at, tip = (row["intensity"], row["gflop_per_s"]), f"tip:{row['tip']}"
            colours = {"color": COLOURS[row["part"]], "ec": COLOURS["paper"], "lw": 1, "zorder": 3}
            axes.scatter(*at, s=(2 * radius) ** 2, **colours).set_gid(tip)
            if row["rank"] <= NUMBERED:
                inside = radius >= ROOMY
                font = {"color": "white" if row["part"] in WHITE else "#0b0f13"} if inside else {}
                place = {"xytext": (0, 0) if inside else (radius + 5, -radius), "textcoords": "offset points"}
                font |= {"size": 11, "weight": "bold", "ha": "center", "va": "center_baseline", "zorder": 4}
                axes.annotate(row["rank"], at, **place, **font).set_gid(tip)
        axes.legend(loc="lower right", handlelength=3)
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")

    limits = {"xlim": bounds, "ylim": (min(ys) / 2.5, max(top, *ys) * 2)}
    return _plot(420, "Operators under the measured ceilings", draw, title="GFLOP/s", xlabel="flop per byte", **limits)
