"""`ddpm-bench static`: what the kernels compile to, without a GPU; `--check` fails on anything that got worse."""

import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.static import BASELINE

WIDTH = 120
UNITS = {"issue": "i", "alu": "a", "fma": "f", "special": "s"}


def _card(prediction: dict[str, Any]) -> Text:
    """ "1.23a  2.50*": the slowest unit of the SM and its letter, the bytes; what binds in bold and with a star."""
    unit = max(UNITS, key=lambda name: prediction[f"{name}_us"])
    text = Text()
    for kind, letter in ((unit, UNITS[unit]), ("bytes", "")):
        binds = prediction["binds"] == kind
        mark = f"{letter}{'*' if binds else ' '}"
        text.append(f"{prediction[f'{kind}_us']:>5.2f}{mark}", style="bold" if binds else "dim")
    return text


def table(arch: str, records: list[dict[str, Any]]) -> Table:
    """One architecture's records as a table of at most 120 columns."""
    grid = Table(title=arch, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    grid.add_column("kernel", no_wrap=True)
    for heading in ("regs", "spill", "stack", "smem", "SASS", "/elem", "×bare", "ld/st", "B/el"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for card in records[0]["cards"]:
        grid.add_column(f"   {card}\n   SM  bytes", no_wrap=True)
    operator = None
    for record in records:
        name, _, variant = record["kernel"].partition(" ")
        label = Text(f"{name if name != operator else '':<{max(14, len(name) + 1)}}{variant}")
        if operator not in (None, name):
            grid.add_section()
        operator = name
        spill = record["spill_store_bytes"] + record["spill_load_bytes"]
        grid.add_row(
            label,
            str(record["registers"]),
            Text(str(spill), style="red bold" if spill else "dim"),
            Text(str(record["stack"]), style="red bold" if record["stack"] else "dim"),
            Text(str(record["shared"]), style="" if record["shared"] else "dim"),
            str(record["instructions"]),
            Text(f"{record['instructions_per_element']:.1f}", style="bold"),
            "-" if record["ratio"] is None else f"{record['ratio']:.2f}",
            f"{record['load_bits']}/{record['store_bits']}",
            f"{record['bytes_per_element']:.3g}",
            *(_card(prediction) for prediction in record["cards"].values()),
        )
    return grid


def show(records: Iterable[dict[str, Any]], console: Console) -> None:
    """Print a table per architecture and what its columns mean."""
    by_arch = sorted(records, key=lambda record: int(record["arch"].removeprefix("sm_")))
    for arch, group in groupby(by_arch, key=lambda record: record["arch"]):
        console.print(table(arch, list(group)))
    console.print(
        "SASS: instructions per thread; /elem: of them per element; ×bare: against Philox + Box-Muller + a store, "
        "- without noise. ld/st: bits of the widest load and store. B/el: bytes of memory traffic per element. Cards: "
        "predicted µs per million elements by the SM (its slowest unit: i issue, a integer ALU, f fp32 and IMAD, "
        "s special functions) and by memory bandwidth, the larger (*) binds. "
        "Nothing here was timed.",
        style="dim",
    )


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    return {"triton": triton.__version__}


def check(records: list[dict[str, Any]], archs: list[str], pattern: re.Pattern[str]) -> list[str]:
    """Violations against the committed baseline, of these architectures and kernels only."""
    from bench.static.report import compare

    baseline = json.loads(BASELINE.read_text())
    if baseline["versions"] != versions():
        raise ValueError(
            f"--check: the baseline was made with {baseline['versions']}, needs the same, not {versions()}"
        )
    wanted = [line for line in baseline["records"] if line["arch"] in archs and pattern.search(line["kernel"])]
    return compare(records, wanted)


def static(
    arch: Annotated[list[str] | None, typer.Option(help="sm_90 and the like; repeat for several, default all")] = None,
    kernel: Annotated[str, typer.Option(metavar="REGEX", help="kernels whose name matches")] = "",
    check_baseline: Annotated[
        bool, typer.Option("--check", help="fail on spills, narrower accesses, over 5% more instructions")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="F", help="write the records to F")] = None,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="write the TTIR and SASS of each to DIR")] = None,
) -> int:
    """Compile every kernel for every architecture, without a GPU, and report what it costs."""
    from bench.static import sass
    from bench.static.cards import ARCHS
    from bench.static.cases import CASES
    from bench.static.report import report

    sass.usable()
    archs = list(dict.fromkeys(arch or ARCHS))
    for name in archs:
        if name not in ARCHS:
            raise typer.BadParameter(f"got {name}, needs one of {', '.join(ARCHS)}", param_hint="--arch")
    try:
        pattern = re.compile(kernel)
    except re.error as error:
        raise typer.BadParameter(f"{kernel!r} is no regular expression: {error}", param_hint="--kernel") from error
    names = [name for name in CASES if pattern.search(name)]
    if not names:
        raise typer.BadParameter(f"{kernel!r} matches none of: {'; '.join(CASES)}", param_hint="--kernel")
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"the folder of {json_file} does not exist", param_hint="--json")

    console = Console()
    console.width = max(console.width, WIDTH)
    records = report(archs, names, dump)
    show(records, console)
    if json_file is not None:
        text = json.dumps({"versions": versions(), "records": records}, indent=1)
        json_file.write_text(text + "\n")
    if check_baseline:
        violations = check(records, archs, pattern)
        for line in violations:
            print(f"error: {line}", file=sys.stderr)
        if violations:
            return 1
        console.print(f"No worse than {BASELINE.parent.name}/{BASELINE.name}: {len(records)} records.")
    return 0
