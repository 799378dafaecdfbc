"""The ladder for people: a table on the terminal and in the README, and a plot."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import store
from bench.interval import Interval, measured_by, median_interval
from bench.ladder.rungs import EAGER
from bench.show import microseconds

HEADINGS = ("rung", "ms per step", "x eager", "to eager", "to float64", "PSNR")
WIDTH = 160


@dataclass(frozen=True)
class Row:
    """One rung: times over processes (None without parity), quality, and why there is no time."""

    name: str
    milliseconds: Interval | None
    ratio: Interval | None
    quality: Mapping[str, Any]
    wrong: str = ""

    def cells(self) -> list[str]:
        """As HEADINGS."""
        quality = self.quality
        distances = [quality[key] for key in ("to_eager", "to_float64")]
        errors = ["not finite" if value is None else f"{value:.1e}" for value in distances]
        picture = "" if None in distances else "the same"
        if quality["psnr_db"] is not None:
            picture = f"{quality['psnr_db']:.0f} dB"
        if self.milliseconds is None:
            return [self.name, self.wrong, "", *errors, picture]
        ratio = "1" if self.ratio is None else self.ratio.text()
        return [self.name, self.milliseconds.text(1), ratio, *errors, picture]


def _wrong(quality: Mapping[str, Any], records: list[Mapping[str, Any]]) -> str:
    """Why a rung has no time."""
    if not quality["parity"]:
        limit = "needs finite values" if quality["tolerance"] is None else f"needs {quality['tolerance']:.1e}"
        return f"parity lost ({limit})"
    failed = next((record["failed"] for record in records if "failed" in record), None)
    return "parity of the timed steps lost" if failed is None else f"failed: {failed}"


def rows_of(content: store.Content) -> list[Row]:
    """One per rung, in the ladder's order. A rung has times only if every process of it was good."""
    found = []
    for name, quality in content["quality"].items():
        records = [record for record in content["records"] if record["candidate"] == name]
        if not (quality["parity"] and records and all(map(store.is_good, records))):
            found.append(Row(name, None, None, quality, _wrong(quality, records)))
            continue
        times = median_interval([record["kernel_us"] * 1e-3 for record in records])
        ratio = None if name == EAGER else median_interval([record["speed_up"] for record in records])
        found.append(Row(name, times, ratio, quality))
    return found


def recipe(content: store.Content) -> str:
    """What was measured, in one sentence."""
    machine, sampling = content["machine"], content["sampling"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"{sampling['solver']}, {sampling['steps']} steps, batch {sampling['batch']},"
        f" guidance {sampling['guidance']:g}; {device}, {machine['threads']} threads, torch {machine['torch']};"
        f" {measured_by(content['processes'])}"
    )


def notes(content: store.Content) -> list[str]:
    """What the table does not say: the evaluation, memory, what was left out and why."""
    lines = []
    if not content["bfloat16_in_hardware"]:
        lines.append("This CPU has neither AVX512-BF16 nor AMX: rung `bf16` emulates it, engines take float32.")
    if content["evaluation"]:
        parts = []
        for label, found in content["evaluation"].items():
            accuracy = "" if found["accuracy"] is None else f", {found['accuracy']:.1%} read as the class asked for"
            parts.append(f"{label}: Frechet distance {found['frechet']:.2f}{accuracy}")
        count = next(iter(content["evaluation"].values()))["n"]
        lines.append(f"{count} samples each: {'; '.join(parts)}.")
    memory = content["memory"]
    if memory is not None and all(memory["engines"].values()):
        parts = [
            f"{engine} {median_interval([found['peak'] / 2**20 for found in processes]).text(0)} MiB"
            for engine, processes in memory["engines"].items()
        ]
        lines.append(f"Peak memory of a process that samples a batch of {memory['batch']}: {', '.join(parts)}.")
    lines += [f"Rung `{name}` is left out: it needs {lack}." for name, lack in content["left_out"].items()]
    return lines


def print_ladder(content: store.Content) -> None:
    """The table and its notes on the terminal."""
    grid = Table(title=recipe(content), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column, heading in enumerate((*HEADINGS, "adds")):
        grid.add_column(heading, justify="right" if 0 < column < len(HEADINGS) else "left", no_wrap=column < 6)
    for row in rows_of(content):
        style = "" if row.milliseconds else "red bold"
        grid.add_row(*row.cells(), content["rungs"][row.name], style=style)
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(grid, highlight=False)
    for line in notes(content):
        console.print(line, highlight=False)


def plot(content: store.Content, path: Path) -> None:
    """Milliseconds per step beside the distances of each rung, as a picture file."""
    from matplotlib.figure import Figure

    rows = rows_of(content)
    places = range(len(rows))
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    times, errors = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in zip(places, rows, strict=True):
        if row.milliseconds is None:
            times.text(0, place, f" {row.wrong}", va="center", color="tab:red")
            continue
        middle = row.milliseconds
        bar = [[middle.median - middle.low], [middle.high - middle.median]]
        color = "0.6" if row.ratio is None else "tab:blue"
        times.barh(place, middle.median, xerr=bar, color=color, height=0.65, error_kw={"ecolor": "0.2", "capsize": 3})
        ratio = "" if row.ratio is None else f"   {row.ratio.median:.2f}x"
        times.text(middle.high, place, f"  {microseconds(middle.median * 1e3)}{ratio}", va="center", fontsize=9)
    times.set_yticks(list(places), [row.name for row in rows])
    times.invert_yaxis()
    times.margins(x=0.28)
    times.set_xlim(left=0)
    times.set_xlabel(f"ms per step, batch {content['sampling']['batch']}, guidance {content['sampling']['guidance']:g}")
    for key, marker, label in (("to_float64", "o", "to a float64 run"), ("to_eager", "x", "to eager")):
        shown = [(row.quality[key], place) for place, row in zip(places, rows, strict=True) if row.quality[key]]
        errors.plot(*zip(*shown, strict=True), marker, color="tab:orange" if marker == "o" else "0.2", label=label)
    errors.set_xscale("log")
    errors.set_xlabel("distance after the whole trajectory")
    errors.grid(axis="x", color="0.9")
    errors.legend(fontsize=8, loc="upper right")
    for axes in (times, errors):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
