"""report.html: one page that needs nothing but itself, made of the figures in profile.json."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bench.profiling import charts
from bench.profiling.charts import number
from bench.profiling.ranges import GAPS, OTHER

WIDTHS = {"wide": 1040, "narrow": 346}
TABLE_ROWS = 16
# What a module without a name of its own is called in the plot of modules.
SHORT = {
    "Conv2d": "conv",
    "ConvTranspose2d": "up conv",
    "BatchNorm2d": "norm",
    "GroupNorm": "norm",
    "MaxPool2d": "pool",
    "AvgPool2d": "pool",
    "ResidualConvBlock": "block",
}
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


def render(content: Mapping[str, Any]) -> str:
    """The page of one profile."""
    run, recipe, device = content["run"], content["recipe"], content["machine"]
    guided = recipe["rows"] > recipe["batch"]
    facts = [
        f"engine {recipe['engine']}",
        f"{recipe['batch']} image{'s' if recipe['batch'] > 1 else ''}",
        f"{recipe['solver']}, {recipe['steps']} steps",
        *([f"guidance {recipe['guidance']:g} (the network sees {recipe['rows']} rows)"] if guided else []),
        recipe["dtype"],
        device["processor"] if device["device"] == "cpu" else device["device"],
        *([f"{device['threads']} threads"] if device["device"] == "cpu" else []),
    ]
    sections = (
        _section("Where a step's time goes", _parts(content)),
        _section("Step by step", _timeline(content)),
        _section("Module by module", _modules(content)),
        _section("Against what this machine can do", _roofline(content)),
        _section("The most expensive operators", _operators(content)),
        _section("Memory", _memory(content)),
        _section("How this was measured", _method(content)),
    )
    name = escape(run["name"])
    style, script = ((files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: where the time of a sample goes</title><style>{style}</style></head><body><main>
<header><p class="eyebrow">fused-ddpm profile</p><h1>{name}: where the time of a sample goes</h1>
<p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p></header>
{_tiles(content)}{"".join(sections)}</main><div id="tip" role="status"></div><script>{script}</script></body></html>
"""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def _both(draw: Any) -> str:
    """A plot for wide and for narrow screens; the style sheet shows one."""
    return "".join(f'<div class="{kind}">{draw(width)}</div>' for kind, width in WIDTHS.items())


def _tiles(content: Mapping[str, Any]) -> str:
    step, bound, best = content["latency"]["step_ms"], content["floor"], content["ceilings"]
    rate = max(best["matmul_gflop_per_s"], best["conv_gflop_per_s"])
    tiles = (
        (number(step["p50"]), "ms per step", f"median; p99 {number(step['p99'])} ms"),
        (number(content["latency"]["images_per_s"]), "images/s", f"{content['recipe']['steps']} steps each"),
        (
            number(bound["arithmetic_ms"]),
            "ms of arithmetic",
            f"{number(bound['flops'] / 1e9)} GFLOP at {rate:,.0f} GFLOP/s",
        ),
        (
            number(bound["traffic_ms"]),
            "ms of memory traffic",
            f"{number(bound['bytes'] / 1e6)} MB at {number(best['copy_gb_per_s'])} GB/s",
        ),
    )
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span>{unit}</span><small>{detail}</small></div>'
        for value, unit, detail in tiles
    )
    larger = "arithmetic" if bound["binds"] == "arithmetic" else "memory traffic of the operators as they are"
    verdict = (
        f"The floor of a step is the larger of the two: {larger}, "
        f"<b>{number(max(bound['arithmetic_ms'], bound['traffic_ms']))} ms, {bound['share']:.0%} of the measured "
        "step</b>. "
        "The rates are the best that a convolution or matrix product, and a copy out of cache, reached in this run."
    )
    return f'<div class="tiles">{cells}</div><p class="verdict">{verdict}</p>'


def _parts(content: Mapping[str, Any]) -> str:
    parts = content["parts"]
    profiler = content["profiler"]
    bar = "".join(
        f'<i class="{part["name"]}" style="width:{part["share"]:.4%}" '
        f'data-tip="{part["name"]}\n{number(part["ms"])} ms, {part["share"]:.1%}"></i>'
        for part in parts
    )
    rows = "".join(
        f'<li><i class="{part["name"]}"></i><b>{part["name"]}</b><em>{part["share"]:.1%}</em>'
        f"<span>{number(part['ms'])} ms</span><small>{MEANING[part['name']]}</small></li>"
        for part in parts
    )
    alone = profiler["gaps_without_ms"]
    without = f"without it about {number(alone)} ms" if alone else "without it next to nothing"
    note = (
        f"Milliseconds per step over {profiler['steps']} steps under the profiler, which makes a step "
        f"{profiler['overhead']:.2f} times as long ({number(profiler['step_ms'])} ms) as it is without. "
        f"It records between operators, so the gaps are an upper bound: {without}."
    )
    return f'<div class="stack">{bar}</div><ul class="parts">{rows}</ul><p class="note">{note}</p>'


def _timeline(content: Mapping[str, Any]) -> str:
    latency = content["latency"]
    count = len(latency["trajectories"])
    warm = ", ".join(number(value) for value in latency["warm_up_ms"])
    note = (
        f"{count} trajector{'ies' if count > 1 else 'y'}, one line each, measured without the profiler. "
        f"Not in the plot: building the engine, {number(latency['build_ms'])} ms, and the warm-up steps before "
        f"({warm} ms)."
    )
    return _both(lambda width: charts.timeline(latency, width)) + f'<p class="note">{note}</p>'


def _collapsed(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node without levels that only wrap one other."""
    node = dict(node)
    while len(node["children"]) == 1 and node["children"][0]["ms"] > 0.9 * node["ms"]:
        node["children"] = node["children"][0]["children"]
    node["children"] = [_collapsed(child) for child in node["children"]]
    return node


def _modules(content: Mapping[str, Any]) -> str:
    root = _collapsed(content["modules"])
    cells: list[str] = []
    deepest = 0

    def place(node: Mapping[str, Any], left: float, depth: int) -> None:
        nonlocal deepest
        deepest = max(deepest, depth)
        share = node["ms"] / root["ms"] if root["ms"] else 0.0
        name = SHORT.get(node["kind"], node["kind"]) if node["name"].isdigit() else node["name"]
        tip = f"{node['path'] or node['name']} ({node['kind']})\n{number(node['ms'])} ms, {share:.1%} of the step"
        # A label that would be cut after its first letters says nothing; the tooltip does.
        label = escape(name) if share * WIDTHS["wide"] > 7.4 * min(len(name), 6) + 7 else ""
        kind = "plain" if depth == 0 or node["name"] == "network" else node["part"]
        if share * WIDTHS["narrow"] < 6.5 * min(len(name), 6) + 4:
            kind += " tight"
        cells.append(
            f'<div class="cell {kind}" style="left:{left:.3%};width:{share:.3%};top:{depth * 32}px" '
            f'data-tip="{escape(tip, quote=True)}">{label}</div>'
        )
        for child in node["children"]:
            place(child, left, depth + 1)
            left += child["ms"] / root["ms"]

    place(root, 0.0, 0)
    if deepest == 0:
        return '<p class="note">This engine does not call the network module by module.</p>'
    note = (
        "Every row splits the one above; widths are wall time per step under the profiler, with the dispatch inside "
        "each module. What is blank below a bar is its own Python. Point at a bar for its time."
    )
    return f'<div class="icicle" style="height:{(deepest + 1) * 32}px">{"".join(cells)}</div><p class="note">{note}</p>'


def shape_text(row: Mapping[str, Any]) -> str:
    """What an operator worked on, in a few characters."""
    shapes = row["shapes"]
    if not shapes:
        return ""
    if row["name"].startswith("conv") and len(shapes) > 1 and len(shapes[0]) == 4:
        x, weight = shapes[:2]
        outputs = weight[1] if "transpose" in row["name"] else weight[0]
        return f"{weight[2]}×{weight[3]}, {x[1]}→{outputs} at {x[2]}×{x[3]}"
    if row["name"] == "linear":
        return f"{shapes[1][1]}→{shapes[1][0]}"
    first = shapes[0]
    if first and isinstance(first[0], list):
        return " + ".join(f"{shape[1]}" for shape in first if len(shape) > 1) + f" at {_size(first[0])}"
    return f"{first[1]} at {_size(first)}" if len(first) == 4 else "×".join(map(str, first))


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[2:])) or "1"


def _ranked(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Operators with rank, the share of their own floor (> 1: from cache) and what a tooltip says."""
    best = content["ceilings"]
    rate = max(best["matmul_gflop_per_s"], best["conv_gflop_per_s"])
    rows = []
    for rank, row in enumerate(content["operators"], start=1):
        more: dict[str, Any] = {"rank": rank, "part": row["parts"][0], "of_floor": None, "intensity": None}
        if row["bytes"] and row["ms"]:
            bound = max(row["flops"] / rate, row["bytes"] / best["copy_gb_per_s"]) / 1e6
            rate_here = row["flops"] / row["ms"] / 1e6
            more |= {"of_floor": bound / row["ms"], "intensity": row["flops"] / row["bytes"], "gflop_per_s": rate_here}
        more["tip"] = (
            f"#{rank} {row['name']} {shape_text(row)}\n{number(row['ms'])} ms per step in {row['calls']:g} calls"
            f"\n{', '.join(row['parts'])}"
        )
        rows.append({**row, **more})
    return rows


def _roofline(content: Mapping[str, Any]) -> str:
    rows = [row for row in _ranked(content) if row["intensity"] and row["share"] > ROOFLINE_SHARE]
    if not rows:
        return '<p class="note">No operator of this engine has a count of flops and bytes.</p>'

    def label(row: Mapping[str, Any], narrow: bool) -> str:
        return f"#{row['rank']}" if narrow else f"#{row['rank']} {row['name']} {shape_text(row)}"

    best = content["ceilings"]
    note = (
        f"One dot per operator and shape, area by time, numbers as in the table below. Best rates measured in the same "
        f"run: matrix product {escape(best['matmul_at'])}, convolution {escape(best['conv_at'])}, copies of "
        f"{escape(best['copy_at'])} and, in cache, {escape(best['cached_copy_at'])}. A dot above the copy line found "
        f"its tensors in cache. Elementwise operators count one flop per output, so theirs is the slope, not the roof."
    )
    chart = _both(lambda width: charts.roofline(rows, content["ceilings"], width, label))
    return chart + f'<p class="note">{note}</p>'


def _operators(content: Mapping[str, Any]) -> str:
    rows = _ranked(content)[:TABLE_ROWS]
    largest = rows[0]["share"] if rows else 1.0
    body = []
    for row in rows:
        cells = (
            ("extra", f"{row['calls']:g}"),
            ("", number(row["ms"])),
            ("extra", "" if row["flops"] is None else number(row["flops"] / 1e9)),
            ("extra", "" if row["bytes"] is None else number(row["bytes"] / 1e6)),
            ("extra", number(row["gflop_per_s"]) if row["flops"] else ""),
            ("extra", "" if row["gb_per_s"] is None else number(row["gb_per_s"])),
            ("", "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"),
        )
        numbers = "".join(f'<td class="n {kind}">{value}</td>' for kind, value in cells)
        body.append(
            f'<tr><td class="n rank">{row["rank"]}</td><td class="name"><i class="{row["part"]}"></i>'
            f"{escape(row['name'])} <small>{escape(shape_text(row))}</small></td>"
            f'<td><div class="share"><s><i style="width:{row["share"] / largest:.1%}"></i></s>{row["share"]:.1%}</div>'
            f"</td>{numbers}</tr>"
        )
    rest = sum(row["share"] for row in content["operators"][TABLE_ROWS:])
    heads = (
        ("n", "#"),
        ("", "operator"),
        ("", "share"),
        ("n extra", "calls"),
        ("n", "ms"),
        ("n extra", "GFLOP"),
        ("n extra", "MB"),
        ("n extra", "GFLOP/s"),
        ("n extra", "GB/s"),
        ("n", "of floor"),
    )
    head = "".join(f'<th class="{kind}">{text}</th>' for kind, text in heads)
    note = (
        "Per step, by operator and shape: an operator with all that it calls inside, so nothing counts twice. "
        f"{rest:.1%} of the step are in {max(0, len(content['operators']) - TABLE_ROWS)} more rows of profile.json. "
        "<b>of floor</b>: what the best measured rates would need, over the time taken; above 100% the tensors came "
        f"from cache. Operators that make up {content['profiler']['counted']:.0%} of the operators' time have counts."
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div><p class="note">{note}</p>'


def _memory(content: Mapping[str, Any]) -> str:
    held, within = content["memory"]["held_bytes"], content["memory"]["step"]
    gpu = content["machine"]["device"] != "cpu"
    plots = []
    for kind, width in (("wide", 508), ("narrow", WIDTHS["narrow"])):
        both = []
        if within:
            both.append(charts.memory(within, "ms since the step began", "MiB allocated above its start", width, True))
        if held:
            stride = max(1, len(held) // 800)
            points = [(k + 1, held[k]) for k in range(0, len(held), stride)]
            what = "MiB allocated after every step" if gpu else "MiB resident after every step"
            both.append(charts.memory(points, "step, all trajectories", what, width, False))
        plots.append(f'<div class="{kind} pair">{"".join(both)}</div>')
    peak, weights = content["memory"]["peak_bytes"], content["memory"]["weights_bytes"]
    where = content["memory"]["step_peak_in"]
    note = (
        f"{'Peak of the allocator' if gpu else 'Peak of the process, PyTorch included'}: {number(peak / 2**20)} MiB; "
        f"the weights are {number(weights / 2**20)} MiB. "
    ) + (f"Within a step the peak is in <b>{escape(where)}</b>." if where else "")
    return f'{"".join(plots)}<p class="note">{note}</p>'


def _method(content: Mapping[str, Any]) -> str:
    device, model = content["machine"], content["run"]["model"]
    commit = device["commit"] or "outside a checkout"
    rows = (
        ("command", content["command"]),
        ("network", ", ".join(f"{key} {value}" for key, value in model.items())),
        ("machine", f"{device['processor']}, {device['threads']} threads, device {device['device']}"),
        ("software", f"Python {device['python']}, torch {device['torch']}, triton {device['triton']}"),
        ("commit", f"{commit}{' with changes' if device['dirty'] else ''}"),
        ("seed", str(content["seed"])),
    )
    table = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    text = (
        "Latencies: whole trajectories without the profiler, from the end of one step's callback to the start of the "
        "next, on CUDA between events on the device. Parts, modules and operators: a few steps under torch.profiler, "
        "with ranges around every module, draw of noise and step; trace.json, written beside this page, holds them for "
        "Perfetto. Flops are two per multiply-accumulate; bytes are every input read and the output written once, "
        "counted from shapes."
    )
    return f'<p class="note">{text}</p><dl>{table}</dl>'
