"""`ddpm-bench static`: what the kernels compile to, without a GPU; `--check` fails on anything that got worse."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.show import Table
from bench.static import ARCHS, BASELINE
from bench.static.cards import CARDS, Card
from ddpm.command_line import FAILED

# Heading -> what stands below it.
COLUMNS = {"kernel": "{kernel}", "regs": "{registers}", "spill": "{spill_store_bytes}/{spill_load_bytes}"}
COLUMNS |= {"stack": "{stack}", "shared": "{shared}", "SASS": "{instructions}", "ld/st": "{load_bits}/{store_bits}"}
COLUMNS |= {"/elem": "{instructions_per_element:.1f}", "B/elem": "{bytes_per_element:.3g}"}
NOTE = (
    "spill: bytes stored/loaded. SASS: instructions. ld/st: bits of the widest. B/elem: memory traffic. Cards: "
    "predicted us per million elements, the larger of issue and bytes (b). Not timed."
)


def predicted(card: Card, record: Mapping[str, Any]) -> str:
    """ "3.1", or "3.1b" where bytes bind."""
    times = card.times(record)
    return f"{max(times.values()):.3g}{'b' if times['bytes'] > times['issue'] else ' '}"


def show(records: Sequence[Mapping[str, Any]], archs: Sequence[str]) -> None:
    """Print a table per architecture, kernels that spill in red, and what the columns mean."""
    for arch in archs:
        mine = [record for record in records if record["arch"] == arch]
        cards = {name: card for name, card in CARDS.items() if card.arch == arch}
        rows = [
            [
                *(text.format(**record) for text in COLUMNS.values()),
                *(predicted(card, record) for card in cards.values()),
            ]
            for record in mine
        ]
        spills = ("spill_store_bytes", "spill_load_bytes", "stack")
        red = {k: "red bold" for k, record in enumerate(mine) if any(record[key] for key in spills)}
        notes = [NOTE] if arch == archs[-1] else []
        Table((*COLUMNS, *cards), "l", rows, arch, red).show(notes, "dim")


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    return {"triton": triton.__version__}


def baseline_records() -> list[dict[str, Any]]:
    """Of the committed baseline. Raises ValueError if another compiler made it."""
    baseline = json.loads(BASELINE.read_text())
    if baseline["versions"] != versions():
        raise ValueError(f"--check: the baseline is of {baseline['versions']}, needs the same, not {versions()}")
    return baseline["records"]


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
    from bench.static.cases import CASES
    from bench.static.report import compare, report

    sass.usable()
    archs = [name for name in ARCHS if name in (arch or ARCHS)]
    for name in arch or ():
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

    records = report(archs, names, dump)
    show(records, archs)
    if json_file is not None:
        text = json.dumps({"versions": versions(), "records": records}, indent=1)
        json_file.write_text(text + "\n")
    if check_baseline:
        wanted = [old for old in baseline_records() if old["arch"] in archs and pattern.search(old["kernel"])]
        violations = compare(records, wanted)
        if violations:
            print(*(f"error: {line}" for line in violations), sep="\n", file=sys.stderr)
            return FAILED
        print(f"No worse than {BASELINE.parent.name}/{BASELINE.name}: {len(records)} records.")
    return 0
