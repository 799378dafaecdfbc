"""The proof that nothing is lost: kills, full disks, damaged and lying files, races, interrupts, threads, tried.

    PYTHONPATH=. python tests/reliability.py --out bench/results/MACHINE/reliability.jsonl

Every try (tests/faults/) is one thing that happens to one command, whose end is compared by content with what an
undisturbed one leaves. What is lost is printed with the command that tries it again. The record has one line for each
case and command: `make report` makes the table in docs/reliability.md of it, test_reliability.py says if it is too old.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.report import read_lines, reliability_summary, reliability_table
from ddpm.files import write_text
from tests.faults import damage, disks, headers, interrupts, kills, races
from tests.faults.tries import Try, outcomes
from tests.faults.works import Shop, warm_up
from tests.records import code_digest

PARTS = {part.__name__.rpartition(".")[2]: part for part in (kills, disks, damage, races, headers, interrupts)}
COMMAND = "PYTHONPATH=. python tests/reliability.py"
SHOWN = 5  # of what was lost, in the record


def rules_digest() -> str:
    """Of the code that tries and judges, without comments and docstrings."""
    return code_digest([Path(__file__), *sorted(Path(__file__).with_name("faults").glob("*.py"))])


def chosen(shop: Shop, only: str, every: int) -> Iterator[Try]:
    """The tries of a part, or with `only` in their name; of each case and command every so-manieth."""

    def wanted(case: str, what: str) -> bool:
        begins = f"{case} / {what} / "
        return only in begins or only.startswith(begins)

    for part, module in PARTS.items():
        everything = only == part
        tries = module.tries(shop, (lambda *_: True) if everything or not only else wanted)
        asked = (one for one in tries if everything or only in one.name)
        counts = Counter()
        for one in asked:
            if counts[one.case, one.what] % every == 0:
                yield one
            counts[one.case, one.what] += 1


def stored(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Put lines into the record, in place of older ones of the same case and command."""
    kept = {(line["case"], line["what"]): line for line in (read_lines(path) if path.exists() else [])}
    kept |= {(line["case"], line["what"]): line for line in lines}
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept.values()))


def tried(only: str, every: int, jobs: int, folder: Path) -> list[dict[str, Any]]:
    """Try, print a line for each case and command and what was lost, and return the lines of the record."""
    warm_up()
    shop, lines = Shop(folder), {}
    for key, tries in groupby(chosen(shop, only, every), lambda one: (one.case, one.what)):
        line = lines.setdefault(key, {"case": key[0], "what": key[1], "tried": 0, "lost": 0, "said": [], "seconds": 0})
        began = time.monotonic()
        for outcome in outcomes(tries, shop, folder, jobs):
            line["tried"] += 1
            if outcome.lost is not None:
                line["lost"] += 1
                line["said"] = [*line["said"], f"{outcome.tried.how}: {outcome.lost}"][:SHOWN]
                print(f"LOST {outcome.tried.name}: {outcome.lost}")
                print(f"    {COMMAND} --only {shlex.quote(outcome.tried.name)}", flush=True)
        line["seconds"] += round(time.monotonic() - began)
        print(f"{key[0]}, {key[1]}: {reliability_summary([line])} ({line['seconds']} s)", flush=True)
    return list(lines.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="F.jsonl", help="the record, which lines are added to")
    parser.add_argument("--only", default="", metavar="TEXT", help=f"{', '.join(PARTS)}, or a part of tries' names")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="the K-th try of each case and command")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tries at a time")
    asked = parser.parse_args()
    began, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        lines = tried(asked.only, asked.every, asked.jobs, Path(folder).resolve())
    if not lines:
        parser.error(f"--only: got {asked.only!r}, needs one of {', '.join(PARTS)} or a part of a try's name")
    machine = describe(torch.device("cpu"))
    about = {key: machine.get(key) for key in ("commit", "dirty", "processor", "torch", "python")}
    about |= {"cores": os.cpu_count(), "date": date, "rules": rules_digest()}
    if asked.out:
        stored(asked.out, [line | about for line in lines])
    reliability_table(lines).show([reliability_summary(lines), f"{time.monotonic() - began:.0f} s"])
    return 1 if any(line["lost"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
