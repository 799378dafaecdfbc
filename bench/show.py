"""Tables for people: what `run` measured, what `compare` concludes, on a terminal or as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import store

WIDTH = 150


def microseconds(value: float) -> str:
    """Three digits with a unit: 812 us, 3.41 ms, 1.62 s."""
    for factor, unit in ((1e-6, "s"), (1e-3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} us"


def _rate(value: float, unit: float, share: float) -> str:
    if not value:
        return "-"
    scaled = value / unit
    return f"{scaled:.0f} ({share:.0%})" if scaled >= 10 else f"{scaled:.2g} ({share:.0%})"


RUN_HEADINGS = (
    "workload", "", "time", "wall", "warm-up", "x eager", "images/s", "peak MB", "GB/s (of copy)", "GFLOP/s (of mm)",
)  # fmt: skip


def run_cells(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one row from its processes' records: medians; or one cell that says what went wrong."""
    first = next((record for record in records if not store.is_good(record)), records[0])
    head = [first["workload"], first["candidate"]]
    if "failed" in first:
        return [*head, f"failed: {first['failed']}"]
    if not first["parity"]:
        error = first["error"] if isinstance(first["error"], str) else f"{first['error']:.2g}"
        return [*head, f"parity lost: error {error} > {first['tolerance']:.2g}, no speed-up"]

    def mid(key: str) -> float | None:
        values = [record[key] for record in records]
        return None if None in values else median(values)

    speed_up, images, memory = mid("speed_up"), mid("images_per_s"), mid("peak_memory_bytes")
    return [
        *head,
        microseconds(mid("kernel_us")),
        microseconds(mid("wall_us")),
        microseconds(mid("warm_up_s") * 1e6),
        "" if speed_up is None else f"{speed_up:.2f}",
        "" if images is None else f"{images:.3g}",
        "-" if memory is None else f"{memory / 2**20:.1f}",
        _rate(mid("bytes_per_s"), 1e9, mid("share_of_copy")),
        _rate(mid("flops_per_s"), 1e9, mid("share_of_product")),
    ]


def run_table(content: store.Content) -> None:
    """Print what was measured, a section per suite."""
    machine = content["machine"]
    title = f"{machine['processor']}, {machine['threads']} threads"
    if machine["device"] != "cpu":
        title = machine["device"]
    grid = Table(title=f"{title}, torch {machine['torch']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column, heading in enumerate(RUN_HEADINGS):
        grid.add_column(heading, justify="left" if column < 2 else "right", no_wrap=True)
    suite, wrong = None, []
    for records in store.rows(content["records"]).values():
        if suite not in (None, records[0]["suite"]):
            grid.add_section()
        suite = records[0]["suite"]
        cells = run_cells(records)
        if len(cells) < len(RUN_HEADINGS):
            wrong.append(cells)
            cells = [*cells[:2], "none, see below"]
        grid.add_row(*cells)
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(grid)
    for name, candidate, reason in wrong:
        console.print(f"{name} {candidate}: {reason}", style="red bold", highlight=False)


CONCLUSION = {0: "no row is slower", 1: "REGRESSION", 3: "SOMETHING DID NOT RUN"}
STYLES = {"slower": "red bold", "failed": "red bold", "parity lost": "red bold", "missing": "red bold"} | {
    "faster": "green",
    "unconfirmed": "yellow",
    "new": "cyan",
}
COMPARE_HEADINGS = ("row", "base", "head", "change", "p", "limit", "against", "verdict")


def _compare_cells(row: Mapping[str, Any]) -> list[str]:
    if row["ratio"] is None:
        return [row["row"], "", "", "", "", "", "", f"{row['status']} ({row['detail']})"]
    return [
        row["row"],
        microseconds(row["base_us"]),
        microseconds(row["head_us"]),
        f"{row['ratio'] - 1:+.1%}",
        f"{row['p']:.2g}",
        f"{row['threshold']:+.0%}",
        row["against"],
        f"{row['status']} ({row['detail']})" if row["detail"] else row["status"],
    ]


def _sides(result: Mapping[str, Any]) -> str:
    """ "base 1a2b3c4d, head 5e6f7a8b, 8 and 8 processes on PROCESSOR"."""
    names = [f"{side} {(result[side]['machine']['commit'] or 'without a commit')[:10]}" for side in ("base", "head")]
    counts = f"{result['base']['processes']} and {result['head']['processes']} processes"
    machine = result["head"]["machine"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return f"{', '.join(names)}; {counts} on {device}"


EXPLANATION = (
    "change: time against eager or the yardstick (a fixed convolution), measured in the same process, head over base. "
    "slower: p < 0.01 by Mann-Whitney over process medians and a change beyond the limit, in two rounds of processes."
)


def compare_table(result: Mapping[str, Any]) -> None:
    """Print a comparison; the conclusion is the last line."""
    grid = Table(title=_sides(result), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column, heading in enumerate(COMPARE_HEADINGS):
        left = heading in ("row", "against", "verdict")
        grid.add_column(heading, justify="left" if left else "right", no_wrap=column < 7)
    for row in result["rows"]:
        grid.add_row(*_compare_cells(row), style=STYLES.get(row["status"], ""))
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(grid, highlight=False)
    console.print(EXPLANATION, style="dim", highlight=False)
    console.print(CONCLUSION[result["exit"]], style="bold", highlight=False)


def compare_markdown(result: Mapping[str, Any]) -> str:
    """A comparison for a pull request or a step summary: what is not `same` first, the rest folded."""
    head = f"| {' | '.join(COMPARE_HEADINGS)} |\n|---|--:|--:|--:|--:|--:|---|---|\n"

    def lines(rows: Sequence[Mapping[str, Any]]) -> str:
        cells = ([cell.replace("|", "\\|") for cell in _compare_cells(row)] for row in rows)
        return head + "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"

    changed = [row for row in result["rows"] if row["status"] != "same"]
    same = [row for row in result["rows"] if row["status"] == "same"]
    parts = [f"### Benchmarks: {CONCLUSION[result['exit']]}\n", f"{_sides(result)}.\n"]
    if changed:
        parts.append(lines(changed))
    if same:
        parts.append(f"<details><summary>{len(same)} rows the same</summary>\n\n{lines(same)}\n</details>\n")
    return "\n".join((*parts, EXPLANATION, ""))
