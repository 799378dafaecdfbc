"""report.html: one page that needs nothing but itself, made of the figures in profile.json by page.html.

The template names the figures by where they stand in profile.json. Numbers are shown with three significant digits.
Plots are matplotlib's SVG, whose colours become the style sheet's variables, as dark mode needs.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.machine import warning_of
from bench.profile import NO_FLOOR, best_rate
from bench.profiling.trace import GAPS, OTHER, PARTS

HERE = Path(__file__).parent
# matplotlib knows no variables: it draws with #0000NN, NN the place in this list, as page.mplstyle does.
VARIABLES = ("ink", "soft", "paper", "line", *PARTS, OTHER)
COLOURS = {name: f"#0000{k:02x}" for k, name in enumerate(VARIABLES, start=1)}
DATA, PEAK, SOFT = COLOURS["encoder"], COLOURS["head"], COLOURS["soft"]
WIDTH = 860  # pixels; the page scales a plot, and scrolls it on narrow screens
NUMBERED, ROOMY = 9, 7  # dots that show their rank; the radius in pixels from which it fits in
WHITE = ("encoder", "head", "solver")  # parts on whose colour white is easier to read than black
UNITS = {"": 1, "giga": 1e9, "mega": 1e6}
TABLE_ROWS = 16
ROOFLINE_SHARE = 0.002  # of the step: what an operator needs to be worth a dot
MEMORY_POINTS = 800
MEANING = {
    "encoder": "init_conv and the down stages",
    "bottleneck": "to_vec and up0",
    "decoder": "up stages, gates, concatenations",
    "head": "the out convolutions",
    "embeddings": "of time and context",
    "solver": "the table's row, guidance",
    "noise": "Philox and Box-Muller",
    OTHER: "operators outside of these",
    GAPS: "no operator ran: Python, dispatch, launches",
}
BAR = '<i class="{name}" style="width:{share:.4%}" data-tip="{name}\n{ms} ms, {share:.1%}"></i>'
LEGEND = '<li><i class="{name}"></i><b>{name}</b><em>{share:.1%}</em><span>{ms} ms</span><small>{meaning}</small></li>'
# A label that would be cut after its first letters says nothing: see .cell in page.css.
CELL = (
    '<div class="cell {kind}" style="left:{left:.3%};width:{share:.3%};top:{top}px" data-tip="{tip}">'
    "<span>{name}</span></div>"
)
ROW = (
    '<tr><td class="n rank">{rank}</td><td class="name"><i class="{part}"></i>{name} <small>{shape}</small></td>'
    '<td><div class="share"><s><i style="width:{bar:.1%}"></i></s>{share:.1%}</div></td>'
    '<td class="n extra">{calls:g}</td><td class="n">{ms}</td><td class="n extra">{flops:giga}</td>'
    '<td class="n extra">{bytes:mega}</td><td class="n extra">{gflop_per_s}</td><td class="n extra">{gb_per_s}</td>'
    '<td class="n">{of_roof:.0%}</td></tr>'
)
ICICLE_NOTE = """<p class="note">Every row splits the one above; widths are wall time per step under the profiler, with
the dispatch inside each module. What is blank below a bar is its own Python. Point at a bar for its time.</p>"""
NO_MODULES = '<p class="note">This engine does not call the network module by module.</p>'
NO_COUNTS = '<p class="note">No operator of this engine has a count of flops and bytes.</p>'
ROW_PIXELS = 32


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
    with rc_context({"svg.hashsalt": label}, HERE / "page.mplstyle"):
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


def memory_plot(points: Sequence[tuple[float, float]], x_label: str, y_label: str, steps: bool) -> str:
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


def _shown(content: Any) -> Any:
    """A part of profile.json as the page shows it: numbers as `Number`, nothing as nan, text escaped."""
    if isinstance(content, Mapping):
        return {key: _shown(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_shown(value) for value in content]
    if isinstance(content, str):
        return escape(content)
    return Number("nan" if content is None else content) if isinstance(content, float | None) else content


def render(content: Mapping[str, Any]) -> str:
    """The page of one profile."""
    page = {kind: (HERE / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    recipe, machine, best = (content[key] for key in ("recipe", "machine", "ceilings"))
    memory, model, gaps = content["memory"], content["run"]["model"], content["profiler"]["gaps_without_ms"]
    cuda, peak_in = machine["device"] != "cpu", memory["step_peak_in"]
    guided = f", guidance {recipe['guidance']:g} (the network sees {recipe['rows']} rows)"
    facts = [
        f"{recipe['batch']} image{'s' if recipe['batch'] > 1 else ''}",
        f"{recipe['solver']}, {recipe['steps']} steps{guided if recipe['rows'] > recipe['batch'] else ''}",
        machine["device"] if cuda else f"{machine['processor']}, {machine['threads']} threads",
    ]
    operators = _ranked(content["operators"], best)
    dots = [row for row in operators if row["intensity"] and row["gflop_per_s"] and row["share"] > ROOFLINE_SHARE]
    rest = operators[TABLE_ROWS:]
    values = {
        "facts": "".join(f"<span>{escape(fact)}</span>" for fact in facts),
        "rate": f"{best_rate(best):,.0f}",
        "verdict": _verdict(content),
        "bar": "".join(BAR.format(**part) for part in _shown(content["parts"])),
        "legend": "".join(LEGEND.format(**part, meaning=MEANING[part["name"]]) for part in _shown(content["parts"])),
        "gaps": f"about {Number(gaps)} ms" if gaps else "next to nothing",
        "timeline": timeline(content["latency"]),
        "warm_up": ", ".join(f"{Number(value)}" for value in content["latency"]["warm_up_ms"]),
        "icicle": _icicle(content["modules"]),
        "roofline": roofline(dots, best) if dots else NO_COUNTS,
        "table": "".join(ROW.format(**_shown(row)) for row in operators[:TABLE_ROWS]),
        "rest": sum(row["share"] for row in rest),
        "rest_rows": len(rest),
        "memory_plots": _memory(memory, cuda),
        "peak_of": "Peak of the allocator" if cuda else "Peak of the process, PyTorch included",
        "peak_mib": Number(memory["peak_bytes"] / 2**20),
        "weights_mib": Number(memory["weights_bytes"] / 2**20),
        "peak_in": f"Within a step the peak is in <b>{escape(peak_in)}</b>." if peak_in else "",
        "network": escape(", ".join(f"{key} {value}" for key, value in model.items())),
        "commit": f"{machine['commit'] or 'outside a checkout'}{' with changes' if machine['dirty'] else ''}",
    }
    return page["html"].format(**_shown(content), **values, css=page["css"], js=page["js"])


def _verdict(content: Mapping[str, Any]) -> str:
    """What the floor is, or why none can be told, and whether the machine was busy."""
    bound = content["floor"]
    floor_ms = Number(max(bound["arithmetic_ms"], bound["traffic_ms"]))
    binds = "arithmetic" if bound["binds"] == "arithmetic" else "memory traffic of the operators as they are"
    said = [
        f"The floor of a step is the larger of the two: {binds}, <b>{floor_ms} ms, {bound['share']:.0%}",
        "of the measured step</b>. The rates are the best that a convolution or matrix product, and a copy out of",
        "cache, reached in this run.",
    ]
    if bound["share"] > 1:
        said = [f"The floor of a step: {NO_FLOOR.format(bound['share'])}."]
    if warning := warning_of((content.get("load") or {}).get("others")):
        said.append(f"<b>{escape(warning.capitalize())}.</b>")
    return "\n".join(said)


def _icicle(root: Mapping[str, Any]) -> str:
    """Modules as bars of their time, each below the one that calls it; levels that only wrap one other are left out."""
    cells: list[str] = []

    def place(node: Mapping[str, Any], left: float, depth: int) -> int:
        """Add the node's cells and return how many rows they take."""
        children, share = node["children"], node["ms"] / root["ms"]
        while len(children) == 1 and children[0]["ms"] > 0.9 * node["ms"]:
            children = children[0]["children"]
        name = node["kind"].removeprefix("Residual").removesuffix("2d") if node["name"].isdigit() else node["name"]
        tip = f"{node['path'] or node['name']} ({node['kind']})\n{Number(node['ms'])} ms, {share:.1%} of the step"
        kind = "plain" if depth == 0 or node["name"] == "network" else node["part"]
        shown = {"name": escape(name), "tip": escape(tip), "kind": kind, "left": left, "share": share}
        cells.append(CELL.format(**shown, top=depth * ROW_PIXELS))
        rows = depth + 1
        for child in children:
            rows = max(rows, place(child, left, depth + 1))
            left += child["ms"] / root["ms"]
        return rows

    rows = place(root, 0.0, 0)
    if rows == 1:
        return NO_MODULES
    return f'<div class="icicle" style="height:{rows * ROW_PIXELS}px">{"".join(cells)}</div>{ICICLE_NOTE}'


def shape_text(name: str, shapes: Sequence[Any]) -> str:
    """What an operator worked on, in a few characters: "3×3, 64→128 at 16×16" of a convolution, else its shapes."""
    first, second = (*shapes, [], [])[:2]
    if name.endswith("::winograd"):  # weights [columns / panel, .., .., panel] of a chain of convolutions
        return f"3×3, {'→'.join(map(str, (first[1], *(w[0] * w[3] for w in second))))} at {first[2]}×{first[3]}"
    if "conv" in name and len(first) == len(second) == 4:
        outputs = second[1] if "transpose" in name else second[0]
        return f"{second[2]}×{second[3]}, {first[1]}→{outputs} at {first[2]}×{first[3]}"
    shown = shapes[1:3] if name == "addmm" else shapes[:2]
    flat = [one for shape in shown for one in (shape if isinstance(shape[0], list) else [shape])]
    return " · ".join("×".join(map(str, shape)) for shape in flat)


def _ranked(operators: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Operators with rank, shape, the share of their own roof (> 1: from cache) and what a tooltip says."""
    rows = []
    for rank, row in enumerate(operators, start=1):
        name, shape = row["name"].removeprefix("fused_ddpm::"), shape_text(row["name"], row["shapes"])
        calls = f"{Number(row['ms'])} ms per step in {row['calls']:g} calls"
        tip = f"#{rank} {name} {shape}\n{calls}\n{', '.join(row['parts'])}"
        of_roof = intensity = None
        if row["bytes"] and row["ms"]:
            bound = max(row["flops"] / best_rate(best), row["bytes"] / best["copy_gb_per_s"]) / 1e6
            of_roof, intensity = bound / row["ms"], row["flops"] / row["bytes"]
        more = {"name": name, "rank": rank, "part": row["parts"][0], "bar": row["share"] / operators[0]["share"]}
        rows.append({**row, **more, "shape": shape, "tip": tip, "of_roof": of_roof, "intensity": intensity})
    return rows


def _memory(memory: Mapping[str, Any], cuda: bool) -> str:
    """Two plots beside each other: within a step, and after every step."""
    held, plots = memory["held_bytes"], []
    if memory["step"]:
        plots.append(memory_plot(memory["step"], "ms since the step began", "MiB allocated above its start", True))
    if held:
        points = [(k + 1, held[k]) for k in range(0, len(held), max(1, len(held) // MEMORY_POINTS))]
        what = f"MiB {'allocated' if cuda else 'resident'} after every step"
        plots.append(memory_plot(points, "step, all trajectories", what, False))
    return f'<div class="pair">{"".join(plots)}</div>'
