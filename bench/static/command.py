"""`ddpm-bench static`: what the kernels compile to, without a GPU; `--check` fails on anything that got worse."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.run import refuse_unwritable
from bench.show import Table
from bench.static import ARCHS, BASELINE, sass
from bench.static.cards import CARDS, Card
from bench.static.cases import CASES
from ddpm.command_line import FAILED
from ddpm.files import write_text
from ddpm.progress import Bar
from ddpm.runs import make_folder

# Heading -> what stands below it.
COLUMNS = {"kernel": "{kernel}", "regs": "{registers}", "spill": "{spill_store_bytes}/{spill_load_bytes}"}
COLUMNS |= {"stack": "{stack}", "shared": "{shared}", "SASS": "{instructions}", "ld/st": "{load_bits}/{store_bits}"}
COLUMNS |= {"/elem": "{instructions_per_element:.1f}", "B/elem": "{bytes_per_element:.3g}"}
NOTES = (
    "spill: bytes stored/loaded. SASS: instructions. ld/st: bits of the widest. B/elem: memory traffic. Not timed.",
    "Cards: predicted us per million elements, the larger of instructions to issue and bytes to move (b).",
)
MORE_INSTRUCTIONS = 1.05
# What may not grow, and what may not shrink. One narrow access among wide ones shows in how many there are.
NO_MORE = ("spill_store_bytes", "spill_load_bytes", "global_loads", "global_stores")
NO_LESS = ("load_bits", "store_bits")


def _compiled(name: str, arch: str) -> tuple[dict[str, Any], str, str]:
    """(record, TTIR, SASS) of a case: what a process can hand back."""
    case = CASES[name]
    launch = case.launch()
    compiled = sass.compile_launch(launch, int(arch.removeprefix("sm_")))
    listing = sass.listing_of(compiled.asm["cubin"])
    facts = sass.measure(compiled.metadata.shared, listing)
    more = {
        "instructions_per_element": round(facts["instructions"] / case.elements_per_thread(), 3),
        "bytes_per_element": case.cost.bytes,
        "vectors": launch.constants.get("LAYOUT", "even") in ("even", "interleaved"),
    }
    return {"kernel": name, "arch": arch} | facts | more, compiled.asm["ttir"], listing


def report(archs: Sequence[str], names: Sequence[str], dump: Path | None) -> list[dict[str, Any]]:
    """Compile cases for architectures, in as many processes as there are cores, and measure them.

    dump: a folder for the TTIR and SASS of each.

    Returns: by arch and case a dictionary of kernel, arch, what `sass.measure` returns, instructions_per_element
    (instructions / elements per thread, an upper bound where a branch skips some, a lower one where a loop repeats
    some), bytes_per_element, vectors (whether the memory layout allows vector accesses).
    """
    pairs, records = [(name, arch) for arch in archs for name in names], []
    workers = ProcessPoolExecutor(min(os.cpu_count() or 1, len(pairs)), mp_context=get_context("spawn"))
    with workers, Bar("compiling", len(pairs), "kernels/s") as bar:
        for record, ttir, listing in workers.map(_compiled, *zip(*pairs, strict=True)):
            records.append(record)
            if dump is not None:
                stem = "-".join(record["kernel"].replace(",", "").split()) + "." + record["arch"]
                write_text(dump / f"{stem}.ttir", ttir)
                write_text(dump / f"{stem}.sass", listing)
            bar.update(len(records))
    return records


def compare(records: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]]) -> list[str]:
    """What got worse against the baseline, a line each: spills, narrower or more accesses, over 5% more instructions.

    Fails closed: a record without a baseline, or the reverse, is a violation too.
    """
    new = {(record["kernel"], record["arch"]): record for record in records}
    old = {(record["kernel"], record["arch"]): record for record in baseline}
    lines = [f"{name}, {arch}: is in the baseline, was not compiled" for name, arch in old if (name, arch) not in new]
    for (name, arch), record in new.items():
        before = old.get((name, arch))
        if before is None:
            lines.append(f"{name}, {arch}: has no baseline (commit one with --json)")
            continue
        worse = [field for field in NO_MORE if record[field] > before[field]]
        worse += [field for field in NO_LESS if record[field] < before[field]]
        lines += [f"{name}, {arch}: {field} {record[field]}, the baseline has {before[field]}" for field in worse]
        now, then = (one["instructions_per_element"] for one in (record, before))
        if now > MORE_INSTRUCTIONS * then:
            change = f"{now}, {now / then - 1:.1%} more than the baseline's {then}"
            lines.append(f"{name}, {arch}: instructions_per_element {change}")
    return lines


def predicted(card: Card, record: Mapping[str, Any]) -> str:
    """ "3.1", or "3.1b" where bytes bind."""
    times = card.times(record)
    return f"{max(times.values()):.3g}{'b' if times['bytes'] > times['issue'] else ' '}"


def show(records: Sequence[Mapping[str, Any]], archs: Sequence[str]) -> None:
    """Print a table per architecture, kernels that spill in red, and what the columns mean."""
    for arch in archs:
        mine = [record for record in records if record["arch"] == arch]
        cards = {name: card for name, card in CARDS.items() if card.arch == arch}
        cells = ([text.format(**record) for text in COLUMNS.values()] for record in mine)
        rows = [row + [predicted(card, one) for card in cards.values()] for row, one in zip(cells, mine, strict=True)]
        spills = ("spill_store_bytes", "spill_load_bytes", "stack")
        red = {k: "red bold" for k, record in enumerate(mine) if any(record[key] for key in spills)}
        notes = NOTES if arch == archs[-1] else ()
        Table((*COLUMNS, *(name.removeprefix("RTX ") for name in cards)), "l", rows, arch, red).show(notes, "dim")


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    return {"triton": triton.__version__}


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
    refuse_unwritable(json=json_file)
    if dump is not None:
        make_folder(dump)
    records = report(archs, names, dump)
    show(records, archs)
    if json_file is not None:
        write_text(json_file, json.dumps({"versions": versions(), "records": records}, indent=1) + "\n")
    if check_baseline:
        baseline = json.loads(BASELINE.read_text())
        if baseline["versions"] != versions():
            raise ValueError(f"--check: the baseline is of {baseline['versions']}, needs the same, not {versions()}")
        wanted = [old for old in baseline["records"] if old["arch"] in archs and pattern.search(old["kernel"])]
        violations = compare(records, wanted)
        if violations:
            print(*(f"error: {line}" for line in violations), sep="\n", file=sys.stderr)
            return FAILED
        print(f"No worse than {BASELINE.parent.name}/{BASELINE.name}: {len(records)} records.")
    return 0
