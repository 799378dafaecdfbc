"""`ddpm-bench history DIR`: stored records over time as one self-contained page, change points marked.

A row's value is the median over a file's processes of what `compare` gates on (relative to eager or the yardstick).
Change points: binary segmentation. The split with the least absolute deviation from both sides' medians counts if the
Mann-Whitney test says p < 0.01 (times the splits that were tried, Bonferroni) and the medians differ by more than 5%;
then both parts are split again.
"""

import html
import io
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bench import store
from bench.verdicts import P_VALUE, THRESHOLD
from ddpm.errors import BadInput
from ddpm.files import write_text

LEAST_SIDE = 4
STYLE = (
    "body{font:14px sans-serif;margin:2em}td,th{text-align:left;padding:2px 1em 2px 0}svg{max-width:100%;height:auto}"
)


def _deviation(values: Sequence[float]) -> float:
    middle = median(values)
    return sum(abs(value - middle) for value in values)


def change_points(values: Sequence[float], offset: int = 0) -> list[int]:
    """Indices at which a new level begins, ascending."""
    from scipy.stats import mannwhitneyu

    splits = range(LEAST_SIDE, len(values) - LEAST_SIDE + 1)
    if not splits:
        return []
    k = min(splits, key=lambda k: _deviation(values[:k]) + _deviation(values[k:]))
    p = float(mannwhitneyu(values[:k], values[k:]).pvalue) * len(splits)
    before, after = median(values[:k]), median(values[k:])
    if p >= P_VALUE or max(before, after) / min(before, after) <= 1 + THRESHOLD:
        return []
    return [*change_points(values[:k], offset), offset + k, *change_points(values[k:], offset + k)]


def series(contents: Sequence[store.Content]) -> dict[str, list[tuple[int, float]]]:
    """{row: [(index of the content, value)]}; records without times are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for index, content in enumerate(contents):
        for row, records in store.rows(content["records"]).items():
            values = [record["gate"] for record in records if store.is_good(record)]
            if values:
                found.setdefault(row, []).append((index, median(values)))
    return found


def read(folder: Path) -> tuple[list[store.Content], list[str]]:
    """All stored files below a folder by date, and the JSON files that are something else.

    Raises BadInput if there is no folder, fewer than two stored files, or they are of different machines.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    contents, others = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            contents.append(store.load(path))
        except BadInput as error:
            others.append(str(error))
    if len(contents) < 2:
        raise BadInput(f"{folder}: found {len(contents)} file(s) of `ddpm-bench run`, needs at least 2")
    machines = {(c["machine"]["processor"], c["machine"]["device"], c["machine"]["threads"]) for c in contents}
    if len(machines) > 1:
        raise BadInput(
            f"{folder}: found {len(machines)} machines, needs the files of one ({'; '.join(map(str, machines))})"
        )
    return sorted(contents, key=lambda content: content["date"]), others


def _plot(rows: dict[str, list[tuple[int, float]]], labels: Sequence[str], changes: dict[str, list[int]]) -> str:
    """One small plot per row, as SVG."""
    from matplotlib.figure import Figure

    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(5 * columns, 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (row, points) in zip(axes.flat, rows.items(), strict=False):
        x, y = [index for index, _ in points], [value for _, value in points]
        axis.plot(x, y, "o-", color="#3b6ea5", markersize=3, linewidth=1)
        edges = [0, *changes[row], len(points)]
        for begin, end in pairwise(edges):
            level = median(y[begin:end])
            axis.hlines(level, x[begin], x[end - 1], color="#888888", linewidth=1)
        for index in changes[row]:
            axis.axvline(x[index] - 0.5, color="#c0392b", linestyle="--", linewidth=1)
        axis.set_title(row, fontsize=8)
        axis.set_ylim(0, 1.15 * max(y))
        axis.set_xlim(-0.5, len(labels) - 0.5)
        shown = range(0, len(labels), max(1, len(labels) // 6))
        axis.set_xticks(list(shown), [labels[k] for k in shown], rotation=30, ha="right", fontsize=6)
        axis.tick_params(axis="y", labelsize=7)
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_axis_off()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _table(rows: list[dict[str, Any]]) -> str:
    return "".join(
        f"<tr><td>{html.escape(row['row'])}</td><td>{html.escape(row['commit'])}</td><td>{row['change']:+.1%}</td></tr>"
        for row in rows
    )


def page(contents: Sequence[store.Content], rows: dict[str, list[tuple[int, float]]]) -> tuple[str, list[dict]]:
    """(the HTML, its change points: row, commit, change)."""
    labels = [(content["machine"]["commit"] or content["date"])[:10] for content in contents]
    changes = {row: change_points([value for _, value in points]) for row, points in rows.items()}
    found = []
    for row, indices in changes.items():
        values = [value for _, value in rows[row]]
        edges = [0, *indices, len(values)]
        for begin, at, end in zip(edges, edges[1:], edges[2:], strict=False):
            change = median(values[at:end]) / median(values[begin:at]) - 1
            found.append({"row": row, "commit": labels[rows[row][at][0]], "change": change})
    machine = contents[0]["machine"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    head = f"{len(contents)} records, {contents[0]['date'][:10]} to {contents[-1]['date'][:10]}, {html.escape(device)}"
    table = f"<table><tr><th>row</th><th>since</th><th>change</th></tr>{_table(found)}</table>" if found else ""
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark history</title><style>{STYLE}</style>"
        f"<h1>Benchmark history</h1><p>{head}. Times relative to eager or the yardstick in the same process; lower is "
        f"faster; red: a change point.</p><p>{len(found)} change point(s).</p>{table}"
        f"{_plot(rows, labels, changes)}</html>\n"
    )
    return text, found


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="stored files of `run`, searched below it too")],
    out: Annotated[Path | None, typer.Option(metavar="F.html", help="default DIR/history.html")] = None,
) -> None:
    """Plot stored records over time and mark where a row's level changed."""
    contents, others = read(folder)
    for line in others:
        print(f"note: left out: {line}", file=sys.stderr)
    out = out or folder / "history.html"
    text, found = page(contents, series(contents))
    write_text(out, text)
    for change in found:
        print(f"{change['change']:+8.1%} since {change['commit']}  {change['row']}")
    print(f"{len(contents)} records, {len(found)} change point(s); wrote {out}")
