"""report.html: one page that needs nothing but itself, made of the figures in profile.json by page.html.

The template names the figures by where they stand in profile.json. Numbers are shown with three significant digits.
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bench.profile import best_rate
from bench.profiling import charts
from bench.profiling.charts import Number
from bench.profiling.trace import GAPS, OTHER

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
    page = {kind: (files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    recipe, machine, best, bound = (content[key] for key in ("recipe", "machine", "ceilings", "floor"))
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
        "binds": "arithmetic" if bound["binds"] == "arithmetic" else "memory traffic of the operators as they are",
        "floor_ms": Number(max(bound["arithmetic_ms"], bound["traffic_ms"])),
        "bar": "".join(BAR.format(**part) for part in _shown(content["parts"])),
        "legend": "".join(LEGEND.format(**part, meaning=MEANING[part["name"]]) for part in _shown(content["parts"])),
        "gaps": f"about {Number(gaps)} ms" if gaps else "next to nothing",
        "timeline": charts.timeline(content["latency"]),
        "warm_up": ", ".join(f"{Number(value)}" for value in content["latency"]["warm_up_ms"]),
        "icicle": _icicle(content["modules"]),
        "roofline": charts.roofline(dots, best) if dots else NO_COUNTS,
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
    height = rows * ROW_PIXELS
    return (
        NO_MODULES
        if rows == 1
        else f'<div class="icicle" style="height:{height}px">{"".join(cells)}</div>{ICICLE_NOTE}'
    )


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
        plots.append(charts.memory(memory["step"], "ms since the step began", "MiB allocated above its start", True))
    if held:
        points = [(k + 1, held[k]) for k in range(0, len(held), max(1, len(held) // MEMORY_POINTS))]
        what = f"MiB {'allocated' if cuda else 'resident'} after every step"
        plots.append(charts.memory(points, "step, all trajectories", what, False))
    return f'<div class="pair">{"".join(plots)}</div>'
