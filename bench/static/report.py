"""Records of the cases, JSON-able and the same for the same compiler, and what got worse between two sets of them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.static import ARCHS, sass
from bench.static.cases import CASES
from ddpm.progress import Bar

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


def report(archs: Sequence[str] = ARCHS, names: Sequence[str] = tuple(CASES), dump: Path | None = None) -> list[dict]:
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
                (dump / f"{stem}.ttir").write_text(ttir)
                (dump / f"{stem}.sass").write_text(listing)
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
        field = "instructions_per_element"
        if record[field] > MORE_INSTRUCTIONS * before[field]:
            percent = 100 * (record[field] / before[field] - 1)
            change = f"{record[field]}, {percent:.1f}% more than the baseline's {before[field]}"
            lines.append(f"{name}, {arch}: {field} {change}")
    return lines
