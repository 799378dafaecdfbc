"""Tables for people, on the terminal and as Markdown: what `run` and `ladder` measured, what `compare` concludes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box, table
from rich.console import Console

from bench import store
from bench.interval import Interval, measured_by, median_interval

WIDTH = 150


@dataclass
class Table:
    """Cells under headings. align: "l" or "r" for each column. title: a line above it, on the terminal.

    styles: rich's, by the number of a row.
    """

    headings: Sequence[str]
    align: str
    rows: list[Sequence[str]]
    title: str = ""
    styles: Mapping[int, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table without its title."""
        marks = "|".join({"l": "---", "r": "--:"}[side] for side in self.align)
        cells = ([cell.replace("|", "\\|") for cell in row] for row in (self.headings, *self.rows))
        first, *rest = (f"| {' | '.join(row)} |" for row in cells)
        return "\n".join((first, f"|{marks}|", *rest))

    def show(self, notes: Sequence[str] = (), style: str = "", width: int = WIDTH) -> None:
        """Print it, and notes in a style below it. A last column of words, beside figures, may be wrapped."""
        grid = table.Table(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for column, (heading, side) in enumerate(zip(self.headings, self.align, strict=True)):
            words = side == "l" and column == len(self.align) - 1
            grid.add_column(heading, justify={"l": "left", "r": "right"}[side], no_wrap=not words)
        for number, row in enumerate(self.rows):
            grid.add_row(*row, style=self.styles.get(number, ""))
        console = Console()
        console.width = max(console.width, width)
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
    return machine["processor"] if machine["device"] == "cpu" else machine["device"]


def _rate(value: float, unit: float, share: float) -> str:
    if not value:
        return "-"
    scaled = value / unit
    return f"{scaled:.0f} ({share:.0%})" if scaled >= 10 else f"{scaled:.2g} ({share:.0%})"


RUN_HEADINGS = (
    "workload", "", "time", "wall", "warm-up", "x eager", "images/s", "peak MB", "GB/s (of copy)", "GFLOP/s (of mm)",
)  # fmt: skip
RUN_ALIGN = "ll" + "r" * 8


def _trouble(record: Mapping[str, Any]) -> str:
    """Why a record has no times."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    error = record["error"] if isinstance(record["error"], str) else f"{record['error']:.2g}"
    return f"parity lost: error {error} > {record['tolerance']:.2g}, no speed-up"


def _figures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells under RUN_HEADINGS beside the names: medians over the processes of one row."""

    def mid(key: str) -> float | None:
        values = [record[key] for record in records]
        return None if None in values else median(values)

    ratios, images, memory = [r["speed_up"] for r in records], mid("images_per_s"), mid("peak_memory_bytes")
    return [
        microseconds(mid("kernel_us")),
        microseconds(mid("wall_us")),
        microseconds(mid("warm_up_s") * 1e6),
        "" if None in ratios else median_interval(ratios).text(),
        "" if images is None else f"{images:.3g}",
        "-" if memory is None else f"{memory / 2**20:.1f}",
        _rate(mid("bytes_per_s"), 1e9, mid("share_of_copy")),
        _rate(mid("flops_per_s"), 1e9, mid("share_of_product")),
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
    machine = content["machine"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return Table(RUN_HEADINGS, RUN_ALIGN, rows, f"{device_of(machine)}{threads}, torch {machine['torch']}"), wrong


CONCLUSION = {0: "no row is slower", 1: "REGRESSION", 3: "SOMETHING DID NOT RUN"}
STYLES = {"slower": "red bold", "failed": "red bold", "parity lost": "red bold", "missing": "red bold"} | {
    "faster": "green",
    "unconfirmed": "yellow",
    "new": "cyan",
}
COMPARE_HEADINGS = ("row", "base", "head", "change", "p", "limit", "against", "verdict")
COMPARE_ALIGN = "lrrrrrll"
EXPLANATION = (
    "change: time against eager or the yardstick (a fixed convolution), measured in the same process, head over base. "
    "slower: p < 0.01 by Mann-Whitney over process medians and a change beyond the limit, in two rounds of processes."
)


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


def _compared(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    styles = {number: STYLES.get(row["status"], "") for number, row in enumerate(rows)}
    return Table(COMPARE_HEADINGS, COMPARE_ALIGN, list(map(_compare_cells, rows)), title, styles)


def _checkouts(result: Mapping[str, Any]) -> str:
    """ "base 1a2b3c4d, head 5e6f7a8b; 8 and 8 processes on PROCESSOR"."""
    names = [f"{side} {(result[side]['machine']['commit'] or 'without a commit')[:10]}" for side in ("base", "head")]
    counts = f"{result['base']['processes']} and {result['head']['processes']} processes"
    return f"{', '.join(names)}; {counts} on {device_of(result['head']['machine'])}"


def compare_table(result: Mapping[str, Any]) -> None:
    """Print a comparison; the conclusion is the last line."""
    _compared(result["rows"], _checkouts(result)).show([EXPLANATION], "dim")
    Console().print(CONCLUSION[result["exit"]], style="bold", highlight=False)


def compare_markdown(result: Mapping[str, Any]) -> str:
    """A comparison for a pull request or a step summary: what is not `same` first, the rest folded."""
    changed = [row for row in result["rows"] if row["status"] != "same"]
    same = [row for row in result["rows"] if row["status"] == "same"]
    parts = [f"### Benchmarks: {CONCLUSION[result['exit']]}\n", f"{_checkouts(result)}.\n"]
    if changed:
        parts.append(_compared(changed).markdown() + "\n")
    if same:
        shown = _compared(same).markdown()
        parts.append(f"<details><summary>{len(same)} rows the same</summary>\n\n{shown}\n\n</details>\n")
    return "\n".join((*parts, EXPLANATION, ""))


LADDER_HEADINGS = (
    "optimisation",
    "ms per step",
    "x eager",
    "peak MB",
    "to eager",
    "to float64",
    "PSNR",
    "what it adds",
)


@dataclass(frozen=True)
class Row:
    """One optimisation of `ladder`: times over processes (None without parity), or why there are none, and quality."""

    name: str
    quality: Mapping[str, Any]
    milliseconds: Interval | None = None
    ratio: Interval | None = None
    memory: float | None = None
    wrong: str = ""

    def cells(self) -> list[str]:
        """As LADDER_HEADINGS, less the last."""
        distances = [self.quality[key] for key in ("to_eager", "to_float64")]
        picture = "" if None in distances else "the same"
        if self.quality["psnr_db"] is not None:
            picture = f"{self.quality['psnr_db']:.0f} dB"
        return [
            self.name,
            self.milliseconds.text(1) if self.milliseconds else self.wrong,
            self.ratio.text() if self.ratio else "1" if self.milliseconds else "",
            "" if self.memory is None else f"{self.memory / 2**20:.1f}",
            *("not finite" if value is None else f"{value:.1e}" for value in distances),
            picture,
        ]


def _without_times(quality: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Why an optimisation has no times; empty if it has. They need every process to have been good."""
    if not quality["parity"]:
        limit = "needs finite values" if quality["tolerance"] is None else f"needs {quality['tolerance']:.1e}"
        return f"parity lost ({limit})"
    failed = next((record["failed"] for record in records if "failed" in record), None)
    if failed is not None:
        return f"failed: {failed}"
    return "" if records and all(map(store.is_good, records)) else "parity of the timed steps lost"


def ladder_rows(content: store.Content) -> list[Row]:
    """One per optimisation, in their order."""
    found = []
    for name, quality in content["quality"].items():
        records = [record for record in content["records"] if record["candidate"] == name]
        wrong = _without_times(quality, records)
        if wrong:
            found.append(Row(name, quality, wrong=wrong))
            continue
        times = median_interval([record["kernel_us"] * 1e-3 for record in records])
        ratios = [record["speed_up"] for record in records]  # None: eager's own
        memory = records[0]["peak_memory_bytes"]
        found.append(Row(name, quality, times, None if None in ratios else median_interval(ratios), memory))
    return found


def ladder_table(content: store.Content) -> Table:
    """The ablation, under a title that says what was measured."""
    machine, sampling, rows = content["machine"], content["sampling"], ladder_rows(content)
    title = (
        f"{sampling['solver']}, {sampling['steps']} steps, batch {sampling['batch']},"
        f" guidance {sampling['guidance']:g}; {device_of(machine)}, {machine['threads']} threads,"
        f" torch {machine['torch']}; {measured_by(content['processes'])}"
    )
    styles = {number: "red bold" for number, row in enumerate(rows) if row.wrong}
    cells = [[*row.cells(), content["rungs"][row.name]] for row in rows]
    return Table(LADDER_HEADINGS, "lrrrrrrl", cells, title, styles)


def ladder_notes(content: store.Content) -> list[str]:
    """What the table does not say."""
    lines = []
    if not content.get("bfloat16_in_hardware", True):  # of records in which `bf16` was measured all the same
        lines.append("This CPU has neither AVX512-BF16 nor AMX: `bf16` emulates it here, engines take float32.")
    return lines + [f"`{name}` is left out: it needs {lack}." for name, lack in content["left_out"].items()]


def ladder_plot(content: store.Content, path: Path) -> None:
    """Milliseconds per step beside the distances of each optimisation, as a picture file."""
    from matplotlib.figure import Figure

    rows, sampling = ladder_rows(content), content["sampling"]
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    times, errors = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        if row.milliseconds is None:
            times.text(0, place, f" {row.wrong}", va="center", color="tab:red")
            continue
        middle, low, high, _ = row.milliseconds
        color = "tab:blue" if row.ratio else "0.6"
        times.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, height=0.65, capsize=3)
        ratio = f"   {row.ratio.median:.2f}x" if row.ratio else ""
        times.text(high, place, f"  {microseconds(middle * 1e3)}{ratio}", va="center", fontsize=9)
    times.set_yticks(range(len(rows)), [row.name for row in rows])
    times.invert_yaxis()
    times.margins(x=0.28)
    times.set(xlim=(0, None), xlabel=f"ms per step, batch {sampling['batch']}, guidance {sampling['guidance']:g}")
    for key, marker, label in (("to_float64", "o", "to a float64 run"), ("to_eager", "x", "to eager")):
        shown = [(row.quality[key], place) for place, row in enumerate(rows) if row.quality[key]]
        errors.plot(*zip(*shown, strict=True), marker, label=label)
    errors.set(xscale="log", xlabel="distance after the whole trajectory")
    errors.grid(axis="x", color="0.9")
    errors.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=130)
