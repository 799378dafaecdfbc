"""report.html: one page that needs nothing but itself, made of the figures in profile.json by page.html.

The template names the figures by where they stand in profile.json. Numbers are shown with three significant digits.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bench.profiling import charts
from bench.profiling.charts import Number
from bench.profiling.ranges import GAPS, OTHER

WIDTHS = {"wide": 1040, "narrow": 346}
TABLE_ROWS = 16
ROOFLINE_SHARE = 0.002  # of the step: what an operator needs to be worth a dot
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
ICICLE_NOTE = """<p class="note">Every row splits the one above; widths are wall time per step under the profiler, with
the dispatch inside each module. What is blank below a bar is its own Python. Point at a bar for its time.</p>"""


def _shown(content: Any) -> Any:
    """A part of profile.json as the page shows it: numbers as Figures, text escaped."""
    if isinstance(content, Mapping):
        return {key: _shown(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_shown(value) for value in content]
    if isinstance(content, str):
        return escape(content)
    return Number(content) if isinstance(content, float) else content


def render(content: Mapping[str, Any]) -> str:
    """The page of one profile."""
    page = {kind: (files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    recipe, machine, best, bound = (content[key] for key in ("recipe", "machine", "ceilings", "floor"))
    latency, memory, model = content["latency"], content["memory"], content["run"]["model"]
    cuda, peak_in, gaps = machine["device"] != "cpu", memory["step_peak_in"], content["profiler"]["gaps_without_ms"]
    guided = f", guidance {recipe['guidance']:g} (the network sees {recipe['rows']} rows)"
    facts = [
        f"{recipe['batch']} image{'s' if recipe['batch'] > 1 else ''}",
        f"{recipe['solver']}, {recipe['steps']} steps{guided if recipe['rows'] > recipe['batch'] else ''}",
        machine["device"] if cuda else f"{machine['processor']}, {machine['threads']} threads",
    ]
    operators = _ranked(content["operators"], best)
    rest = operators[TABLE_ROWS:]
    values = {
        "facts": "".join(f"<span>{escape(fact)}</span>" for fact in facts),
        "rate": f"{_rate(best):,.0f}",
        "binds": "arithmetic" if bound["binds"] == "arithmetic" else "memory traffic of the operators as they are",
        "floor_ms": Number(max(bound["arithmetic_ms"], bound["traffic_ms"])),
        "bar": "".join(BAR.format(**part) for part in _shown(content["parts"])),
        "legend": "".join(LEGEND.format(**part, meaning=MEANING[part["name"]]) for part in _shown(content["parts"])),
        "gaps": f"about {Number(gaps)} ms" if gaps else "next to nothing",
        "timeline": _both(lambda width: charts.timeline(latency, width)),
        "warm_up": ", ".join(f"{Number(value)}" for value in latency["warm_up_ms"]),
        "icicle": _icicle(content["modules"]),
        "roofline": _roofline(operators, best),
        "table": "".join(_row(row, operators[0]["share"]) for row in operators[:TABLE_ROWS]),
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


def _both(draw: Callable[[int], str]) -> str:
    """A plot for wide and for narrow screens; the style sheet shows one."""
    return "".join(f'<div class="{kind}">{draw(width)}</div>' for kind, width in WIDTHS.items())


def _rate(best: Mapping[str, Any]) -> float:
    """The best GFLOP/s measured."""
    return max(best["matmul_gflop_per_s"], best["conv_gflop_per_s"])


def _collapsed(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node without levels that only wrap one other."""
    children = node["children"]
    while len(children) == 1 and children[0]["ms"] > 0.9 * node["ms"]:
        children = children[0]["children"]
    return {**node, "children": [_collapsed(child) for child in children]}


def _icicle(modules: Mapping[str, Any]) -> str:
    root = _collapsed(modules)
    cells: list[str] = []

    def place(node: Mapping[str, Any], left: float, depth: int) -> int:
        """Add the node's cells and return how many rows they take."""
        share = node["ms"] / root["ms"]
        name = node["kind"].removeprefix("Residual").removesuffix("2d") if node["name"].isdigit() else node["name"]
        tip = f"{node['path'] or node['name']} ({node['kind']})\n{Number(node['ms'])} ms, {share:.1%} of the step"
        kind = "plain" if depth == 0 or node["name"] == "network" else node["part"]
        # A label that would be cut after its first letters says nothing: see .cell in page.css.
        cells.append(
            f'<div class="cell {kind}" style="left:{left:.3%};width:{share:.3%};top:{depth * 32}px" '
            f'data-tip="{escape(tip)}"><span>{escape(name)}</span></div>'
        )
        rows = depth + 1
        for child in node["children"]:
            rows = max(rows, place(child, left, depth + 1))
            left += child["ms"] / root["ms"]
        return rows

    rows = place(root, 0.0, 0)
    if rows == 1:
        return '<p class="note">This engine does not call the network module by module.</p>'
    return f'<div class="icicle" style="height:{rows * 32}px">{"".join(cells)}</div>{ICICLE_NOTE}'


def shape_text(row: Mapping[str, Any]) -> str:
    """What an operator worked on, in a few characters."""
    shapes, name = row["shapes"], row["name"]
    if not shapes:
        return ""
    first = shapes[0]
    images = len(first) == 4
    if name.endswith("::winograd"):  # weights [columns / panel, .., .., panel] of a chain of convolutions
        return f"3×3, {'→'.join(map(str, (first[1], *(w[0] * w[3] for w in shapes[1]))))} at {first[2]}×{first[3]}"
    if "conv" in name and images and len(shapes) > 1:
        weight = shapes[1]
        outputs = weight[1] if "transpose" in name else weight[0]
        return f"{weight[2]}×{weight[3]}, {first[1]}→{outputs} at {first[2]}×{first[3]}"
    if name == "linear":
        return f"{shapes[1][1]}→{shapes[1][0]}"
    if name in ("mm", "bmm", "matmul", "addmm"):
        factors = shapes[1:3] if name == "addmm" else shapes[:2]
        return " · ".join("×".join(map(str, shape)) for shape in factors)
    listed = first if isinstance(first[0], list) else [first]
    if len(listed[0]) == 4:
        return f"{' + '.join(str(shape[1]) for shape in listed)} at {listed[0][2]}×{listed[0][3]}"
    return " + ".join("×".join(map(str, shape)) for shape in listed)


def _ranked(operators: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Operators with rank, shape, the share of their own roof (> 1: from cache) and what a tooltip says."""
    rows = []
    for rank, row in enumerate(operators, start=1):
        name = row["name"].removeprefix("fused_ddpm::")
        more = {
            "name": name,
            "rank": rank,
            "part": row["parts"][0],
            "shape": shape_text(row),
            "of_roof": None,
            "intensity": None,
        }
        more["tip"] = (
            f"#{rank} {name} {more['shape']}\n{Number(row['ms'])} ms per step in {row['calls']:g} calls"
            f"\n{', '.join(row['parts'])}"
        )
        if row["bytes"] and row["ms"]:
            bound = max(row["flops"] / _rate(best), row["bytes"] / best["copy_gb_per_s"]) / 1e6
            more |= {"of_roof": bound / row["ms"], "intensity": row["flops"] / row["bytes"]}
        rows.append({**row, **more})
    return rows


def _roofline(operators: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    rows = [row for row in operators if row["intensity"] and row["share"] > ROOFLINE_SHARE]
    if not rows:
        return '<p class="note">No operator of this engine has a count of flops and bytes.</p>'
    return _both(lambda width: charts.roofline(rows, best, width))


def _row(row: Mapping[str, Any], largest: float) -> str:
    """A row of the table of operators; largest: the share that fills its bar."""

    def cell(key: str, spec: str = "", kind: str = "extra") -> str:
        return f'<td class="n {kind}">{"" if row[key] is None else format(Number(row[key]), spec)}</td>'

    return (
        f'<tr><td class="n rank">{row["rank"]}</td><td class="name"><i class="{row["part"]}"></i>'
        f"{escape(row['name'])} <small>{escape(row['shape'])}</small></td>"
        f'<td><div class="share"><s><i style="width:{row["share"] / largest:.1%}"></i></s>{row["share"]:.1%}</div></td>'
        f"{cell('calls', 'g')}{cell('ms', kind='')}{cell('flops', 'giga')}{cell('bytes', 'mega')}"
        f"{cell('gflop_per_s')}{cell('gb_per_s')}{cell('of_roof', '.0%', '')}</tr>"
    )


def _memory(memory: Mapping[str, Any], cuda: bool) -> str:
    """Two plots beside each other, below each other on narrow screens: within a step, and after every step."""
    held, within = memory["held_bytes"], memory["step"]
    points = [(k + 1, held[k]) for k in range(0, len(held), max(1, len(held) // 800))]
    what = f"MiB {'allocated' if cuda else 'resident'} after every step"
    divs = []
    for kind, width in (("wide", 508), ("narrow", WIDTHS["narrow"])):
        plots = []
        if within:
            plots.append(charts.memory(within, "ms since the step began", "MiB allocated above its start", width, True))
        if points:
            plots.append(charts.memory(points, "step, all trajectories", what, width, False))
        divs.append(f'<div class="{kind} pair">{"".join(plots)}</div>')
    return "".join(divs)
