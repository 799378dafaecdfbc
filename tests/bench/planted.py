"""The proof of `ddpm-bench compare`: what is planted in a project is caught, what is harmless there is not.

    PYTHONPATH=. python tests/bench/planted.py --repeat 3 --out bench/results/MACHINE/planted.jsonl

Each plant (plants.py) is a commit on top of `base` in the repository of foreign.py. The command line runs there as a
user's would, in an environment that has the package installed, and its exit code and words are known beforehand. The
last of several repetitions runs beside processes that keep every core busy half of the time. The record has one line
for each plant and repetition, and goes on where it was stopped: `make report` makes the table in docs/ci.md of it,
test_planted.py says if it is too old.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from bench.machine import describe
from bench.report import planted_outcome, planted_summary, planted_table, read_lines
from tests.bench.foreign import ROOT, commit, git, make_environment, make_repository
from tests.bench.plants import PLANTS
from tests.records import code_digest, put

# What decides: a record was made by other rules if one of these files has other code.
RULES = tuple(ROOT / "bench" / name for name in ("verdicts.py", "statistics.py"))
LIMIT = 900  # seconds after which the comparison itself hangs

LOAD = """
import random, sys, time
import numpy
draw, matrix = random.Random(int(sys.argv[1])), numpy.ones((300, 300))
while True:
    burst = time.monotonic() + draw.uniform(0.05, 1.0)
    while time.monotonic() < burst:
        matrix @ matrix
    time.sleep(draw.uniform(0, 1.0))
"""


@contextmanager
def busy() -> Iterator[None]:
    """A process for each core that keeps it busy half of the time, in bursts of up to a second."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    load = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(seed)], env=environment)
        for seed in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Project:
    """The repository, its user's variables, and the folder both lie in."""

    root: Path
    environment: dict[str, str]


def make_project(folder: Path, names: Sequence[str]) -> Project:
    """The repository with a branch plant/N for each of these plants, N its place in PLANTS, and its environment."""
    root = folder / "project"
    make_repository(root)
    environment = make_environment(folder / "venv", root / "python")
    for name in names:
        git(root, "checkout", "-q", "--detach", "base")
        PLANTS[name].change(root)
        commit(root, branch_of(name))
    return Project(root, environment)


def copies(project: Project, count: int) -> Queue[Project]:
    """The project and clones of its repository, so many in all, for as many comparisons at a time."""
    found: Queue[Project] = Queue()
    found.put(project)
    for number in range(1, count):
        root = project.root.parent / str(number) / project.root.name
        shutil.copytree(project.root, root, symlinks=True)
        found.put(Project(root, project.environment))
    return found


def branch_of(name: str) -> str:
    return f"plant/{list(PLANTS).index(name)}"


def _lines(result: Path, said: str) -> list[str]:
    """What a comparison said of each row, and on stderr: without folders, which differ from run to run."""
    rows = json.loads(result.read_text())["rows"] if result.exists() else []
    lines = [f"{row['row']}: {row['status']} {row.get('detail', '')}".strip() for row in rows]
    errors = [line for line in said.splitlines() if re.match(r"error|note|warning", line)]
    return [*lines, *(re.sub(r"(?<![\w.])/\S*/", "", line) for line in errors)]


def compared(project: Project, name: str) -> dict[str, Any]:
    """One comparison of base with a plant: its exit code, what it said, and whether that is what must come out."""
    plant = PLANTS[name]
    git(project.root, "checkout", "-q", branch_of(name))
    result = project.root.parent / "result.json"
    result.unlink(missing_ok=True)
    command = ["ddpm-bench", "compare", "base", "HEAD", "--json", str(result)]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=project.root, env=project.environment, capture_output=True, text=True, timeout=LIMIT
    )
    lines = _lines(result, done.stderr)
    says = not plant.says or any(re.search(plant.says, line) for line in lines)
    return {
        "plant": name,
        "kind": plant.kind,
        "expected": plant.exit,
        "exit": done.returncode,
        "as_expected": done.returncode == plant.exit and says,
        "seconds": round(time.monotonic() - began),
        "load": round(os.getloadavg()[0], 1),
        "said": lines,
    }


def rules_digest() -> str:
    """Of the code that decides."""
    return code_digest(path for path in RULES if path.exists())


def is_stored(path: Path | None, name: str, repetition: int) -> bool:
    """Whether the record has a line of this plant and repetition, by the rules of today."""
    lines = read_lines(path) if path is not None and path.exists() else []
    of = {(line["plant"], line["repetition"]) for line in lines if line["rules"] == rules_digest()}
    return (name, repetition) in of


def stored(path: Path, line: dict[str, Any]) -> None:
    """Put a line into the record, in place of an older one of the same plant and repetition."""

    def place(line: dict[str, Any]) -> tuple[int, int] | None:
        return (line["repetition"], list(PLANTS).index(line["plant"])) if line["plant"] in PLANTS else None

    put(path, line, place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="of 2 and more, the last is under load")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="plants with this in the name, anew"
    )
    parser.add_argument("--out", type=Path, metavar="F.jsonl", help="the record, which lines are added to")
    parser.add_argument("--jobs", type=int, default=1, help="comparisons at a time, which disturb each other")
    asked = parser.parse_args()
    names = [name for name in PLANTS if not asked.only or any(part in name for part in asked.only)]
    if not names:
        parser.error(f"--only: needs a part of one of {', '.join(PLANTS)}")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
    machine = describe(torch.device("cpu"))
    about = {key: machine.get(key) for key in ("commit", "dirty", "processor", "torch", "python")}
    about |= {"cores": os.cpu_count(), "rules": rules_digest()}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        projects = copies(make_project(Path(folder).resolve(), names), asked.jobs)
        for repetition in range(asked.repeat):
            loaded = 0 < repetition == asked.repeat - 1

            def one(name: str, repetition: int = repetition, loaded: bool = loaded) -> dict[str, Any]:
                date = datetime.now(UTC).isoformat(timespec="seconds")
                project = projects.get()
                try:
                    found = compared(project, name)
                finally:
                    projects.put(project)
                return {"date": date, "repetition": repetition, "loaded": loaded} | found | about

            left = [name for name in names if asked.only or not is_stored(asked.out, name, repetition)]
            with busy() if loaded else nullcontext(), ThreadPoolExecutor(asked.jobs) as pool:
                for line in pool.map(one, left):
                    lines.append(line)
                    if asked.out:
                        stored(asked.out, line)
                    print(
                        f"repetition {repetition + 1} of {asked.repeat} {'loaded ' * loaded}{line['plant']}: "
                        f"{planted_outcome(line)} (exit {line['exit']}, {line['seconds']} s, load {line['load']})",
                        *([] if line["as_expected"] else line["said"]),
                        sep="\n    ",
                        flush=True,
                    )
    lines = read_lines(asked.out) if asked.out else lines
    planted_table(lines).show([planted_summary(lines)])
    return 0 if all(line["as_expected"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
