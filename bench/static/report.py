"""Records of the cases, JSON-able and the same for the same compiler, and what got worse between two sets of them."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bench.static import sass
from bench.static.cards import ARCHS, CARDS
from bench.static.cases import CASES

MORE_INSTRUCTIONS = 1.05


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _compile(name: str, arch: str) -> tuple[bytes, int, str]:
    """(cubin, shared bytes, TTIR): what a process can hand back."""
    compiled = sass.compile_launch(CASES[name].launch(), _capability(arch))
    return compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttir"]


def _record(name: str, arch: str, cubin: bytes, shared: int, listing: str) -> dict[str, Any]:
    case = CASES[name]
    facts, per_thread = sass.measure(cubin, shared, listing), case.elements_per_thread()
    return {
        "kernel": name,
        "arch": arch,
        **facts,
        "instructions_per_element": round(facts["instructions"] / per_thread, 3),
        "per_element": {kind: round(number / per_thread, 3) for kind, number in facts["classes"].items()},
        "bytes_per_element": case.cost.bytes,
        "vectors": case.launch().constants.get("LAYOUT", "even") in ("even", "interleaved"),
    }


def predict(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each card of the record's arch: microseconds per million elements of each unit and bytes, and what binds."""
    cards = {}
    for name, card in CARDS.items():
        if card.arch == record["arch"]:
            times = card.times(record["per_element"], record["bytes_per_element"])
            cards[name] = {f"{unit}_us": round(time, 3) for unit, time in times.items()}
            cards[name]["binds"] = max(times, key=times.__getitem__)
    return cards


def report(archs: Sequence[str] = ARCHS, names: Sequence[str] = tuple(CASES), dump: Path | None = None) -> list[dict]:
    """Compile cases for architectures, in as many processes as there are cores, and measure them.

    dump: a folder for the TTIR and SASS of each.

    Returns: by arch and case a dictionary of kernel, arch, what `sass.measure` returns, instructions_per_element
    (instructions / elements per thread, an upper bound where a branch skips some, a lower one where a loop repeats
    some), per_element (the same by class), ratio (of instructions_per_element to the bare kernel's, None for a kernel
    without noise), bytes_per_element, vectors (whether the memory layout allows vector accesses), cards (see
    `predict`).
    """
    everything = list(dict.fromkeys([*names, *filter(None, (CASES[name].yardstick for name in names))]))
    pairs = [(name, arch) for arch in archs for name in everything]
    console = Console(stderr=True)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(pairs)), mp_context=get_context("spawn")) as workers:
        compiled = workers.map(_compile, *zip(*pairs, strict=True))
        shown = {"console": console, "transient": True, "disable": not console.is_terminal}
        binaries = list(track(compiled, "compiling", total=len(pairs), **shown))
    records = {}
    for arch in archs:
        mine = [(name, binary) for (name, of), binary in zip(pairs, binaries, strict=True) if of == arch]
        listings = sass.disassemble([sass.machine_code(cubin) for _, (cubin, *_) in mine], _capability(arch))
        for (name, (cubin, shared, ttir)), listing in zip(mine, listings, strict=True):
            records[name, arch] = _record(name, arch, cubin, shared, listing)
            if dump is not None:
                stem = "-".join(name.replace(",", "").split()) + "." + arch
                (dump / f"{stem}.ttir").write_text(ttir)
                (dump / f"{stem}.sass").write_text(listing + "\n")
    for (name, arch), record in records.items():
        yardstick = records.get((CASES[name].yardstick, arch))
        per_element = record["instructions_per_element"]
        record["ratio"] = yardstick and round(per_element / yardstick["instructions_per_element"], 3)
        record["cards"] = predict(record)
    return [record for (name, _), record in records.items() if name in names]


def compare(records: Iterable[dict[str, Any]], baseline: Iterable[dict[str, Any]]) -> list[str]:
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
        # One narrow access among wide ones shows in how many there are.
        more = ("spill_store_bytes", "spill_load_bytes", "global_loads", "global_stores")
        worse = [field for field in more if record[field] > before[field]]
        worse += [field for field in ("load_bits", "store_bits") if record[field] < before[field]]
        lines += [f"{name}, {arch}: {field} {record[field]}, the baseline has {before[field]}" for field in worse]
        field = "instructions_per_element"
        if record[field] > MORE_INSTRUCTIONS * before[field]:
            percent = 100 * (record[field] / before[field] - 1)
            change = f"{record[field]}, {percent:.1f}% more than the baseline's {before[field]}"
            lines.append(f"{name}, {arch}: {field} {change}")
    return lines
