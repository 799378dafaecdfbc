"""Tables for people, on the terminal and as Markdown: what `run` measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich import box, table
from rich.console import Console
from rich.markup import escape

from bench import store
from bench.interval import median_interval

WIDTH = 150


@dataclass
class Table:
    """Cells under headings. align: "l" or "r" for each column, "r" where it ends. title: above it, on the terminal.

    styles: rich's, by the number of a row.
    """

    headings: Sequence[str]
    align: str
    rows: list[Sequence[str]]
    title: str = ""
    styles: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.align = self.align.ljust(len(self.headings), "r")

    def markdown(self) -> str:
        """The table without its title."""
        marks = "|".join({"l": "---", "r": "--:"}[side] for side in self.align)
        cells = ([cell.replace("|", "\\|") for cell in row] for row in (self.headings, *self.rows))
        first, *rest = (f"| {' | '.join(row)} |" for row in cells)
        return "\n".join((first, f"|{marks}|", *rest))

    def show(self, notes: Sequence[str] = (), style: str = "") -> None:
        """Print it, and notes in a style below it. A last column of words, beside figures, may be wrapped."""
        grid = table.Table(title=escape(self.title) or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for column, (heading, side) in enumerate(zip(self.headings, self.align, strict=True)):
            words = side == "l" and column == len(self.align) - 1
            grid.add_column(heading, justify={"l": "left", "r": "right"}[side], no_wrap=not words)
        for number, row in enumerate(self.rows):
            grid.add_row(*map(escape, row), style=self.styles.get(number, ""))
        console = Console()
        console.width = max(console.width, WIDTH)
        console.print(grid, highlight=False)
        for note in notes:
            console.print(note, style=style, highlight=False, markup=False)


def microseconds(value: float) -> str:
    """Three digits with a unit: 812 us, 3.41 ms, 1.62 s."""
    for factor, unit in ((1e-6, "s"), (1e-3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} us"


def device_of(machine: Mapping[str, Any]) -> str:
    """The name of the card, or of the processor where it computed."""
    return (machine.get("processor") or "an unknown CPU") if machine["device"] == "cpu" else machine["device"]


def where(machine: Mapping[str, Any]) -> str:
    """The device and what computed on it."""
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{device_of(machine)}{threads}, torch {machine['torch']}"


def middle(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The median over the processes of one row; None where a record has no value."""
    values = [record[key] for record in records]
    return None if None in values else median(values)


def _rate(value: float, share: float | None) -> str:
    """In units of 10^9."""
    scaled = value / 1e9
    digits = ".0f" if scaled >= 10 else ".2g"
    if not value:
        return "-"
    return f"{scaled:{digits}}" + ("" if share is None else f" ({share:.0%})")


RUN_HEADINGS = (
    "workload", "", "time", "wall", "warm-up", "x eager", "images/s", "peak MB", "GB/s (of copy)", "GFLOP/s (of mm)",
)  # fmt: skip


def _trouble(record: Mapping[str, Any]) -> str:
    """Why a record has no times."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    error = record["error"] if isinstance(record["error"], str) else f"{record['error']:.2g}"
    return f"parity lost: error {error} > {record['tolerance']:.2g}, no speed-up"


def _figures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells under RUN_HEADINGS beside the names: medians over the processes of one row."""
    ratios, images, memory = (middle(records, key) for key in ("speed_up", "images_per_s", "peak_memory_bytes"))
    return [
        *(microseconds(middle(records, key)) for key in ("kernel_us", "wall_us")),
        microseconds(middle(records, "warm_up_s") * 1e6),
        "" if ratios is None else median_interval([record["speed_up"] for record in records]).text(),
        "" if images is None else f"{images:.3g}",
        "-" if memory is None else f"{memory / 2**20:.1f}",
        _rate(middle(records, "bytes_per_s"), middle(records, "share_of_copy")),
        _rate(middle(records, "flops_per_s"), middle(records, "share_of_product")),
    ]


def run_table(content: store.Content) -> tuple[Table, list[str]]:
    """(what was measured, a line for each row that failed or lost parity)."""
    rows, wrong = [], []
    for name, records in store.rows(content["records"]).items():
        bad = next((record for record in records if not store.is_good(record)), None)
        if bad is not None:
            wrong.append(f"{name}: {_trouble(bad)}")
        figures = _figures(records) if bad is None else ["none, see below", *[""] * 7]
        rows.append([records[0]["workload"], records[0]["candidate"], *figures])
    return Table(RUN_HEADINGS, "ll", rows, where(content["machine"])), wrong
