"""Two git refs side by side: unpacked into temporary folders, measured by the same runner in interleaved processes.

The runner is this checkout's bench/, copied over each side's, so that both do exactly the same work; it imports each
side's own ddpm/, kernels/ and export/. Where base lacks a name that the benchmarks of head import (a new operator),
base runs the benchmarks that it came with, and that is said.
"""

import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from bench import machine, store
from bench.machine import ROOT
from bench.run import environment, merged, run_child
from ddpm.errors import BadInput, WorkFailed
from ddpm.progress import Bar

MEASURED = ("bench", "ddpm", "export", "kernels")
RESULTS = "bench/results"


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    done = machine.git(*arguments)
    if done is None:
        raise BadInput("git refs were given, needs git in the PATH or two stored files")
    return done


def commit_of(ref: str) -> str:
    """The full hash of a ref. Raises BadInput if there is none of that name here."""
    if _git("rev-parse", "--git-dir").returncode:
        raise BadInput(f"{ref}: not a file, and this folder is in no git checkout: needs two stored files")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode:
        raise BadInput(f"{ref}: neither a file nor a commit of this repository")
    return found.stdout.decode().strip()


def refuse_dirty() -> None:
    """Raise BadInput if what is measured has changes that no ref contains: of another project, any tracked file."""
    paths = ["--", *MEASURED, f":(exclude){RESULTS}"] if machine.repository() == ROOT else ["--untracked-files=no"]
    changed = _git("status", "--porcelain", *paths).stdout.decode().splitlines()
    if changed:
        raise BadInput(
            f"{changed[0][3:]}: is changed in no ref ({len(changed)} such file(s)), needs a commit or a stash, or"
            " two stored files"
        )


def _unpack(commit: str, folder: Path) -> None:
    done = _git("archive", "--format=tar", commit)
    if done.returncode:
        raise WorkFailed(f"{commit}: git archive said: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


LIST = """import sys
from bench.registry import selected
for workload in selected(sys.argv[1], bool(sys.argv[2]), sys.argv[3])[0]:
    print(workload.name)
"""


def _names(root: Path, suite: str, quick: bool, pattern: str) -> list[str]:
    """The workloads that a side's benchmarks select. Raises WorkFailed with the reason if they cannot be listed."""
    command = [sys.executable, "-c", LIST, suite, "1" if quick else "", pattern]
    done = subprocess.run(  # noqa: S603
        command, cwd=root, env=environment(root), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.splitlines()


@dataclass(frozen=True)
class Checkouts:
    """roots: {"base": folder, "head": folder}. gone: workloads that base knows and head does not."""

    roots: dict[str, Path]
    gone: list[str]


@contextmanager
def checkouts(base: str, head: str, suite: str, quick: bool, pattern: str) -> Iterator[Checkouts]:
    """Two commits under this runner; the folders are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        roots = {"base": Path(folder) / "base", "head": Path(folder) / "head"}
        known, names = [], {}
        for (side, root), commit in zip(roots.items(), (base, head), strict=True):
            _unpack(commit, root)
            own = root / "bench"
            if side == "base":
                known = _own_names(root, suite, quick, pattern)
            if own.exists():
                own.rename(root / "bench.own")
            shutil.copytree(ROOT / "bench", own, ignore=shutil.ignore_patterns("results", "__pycache__"))
            try:
                names[side] = _names(root, suite, quick, pattern)
            except WorkFailed as error:
                if side == "head" or not known:
                    raise WorkFailed(f"{side} cannot be measured: {error}") from error
                print(f"note: base runs its own benchmarks, head's need what it lacks ({error})", file=sys.stderr)
                shutil.rmtree(own)
                (root / "bench.own").rename(own)
        yield Checkouts(roots, [name for name in known if name not in names["head"]])


def _own_names(root: Path, suite: str, quick: bool, pattern: str) -> list[str]:
    """What base's own benchmarks would run: what is not in head's any more has disappeared."""
    try:
        return _names(root, suite, quick, pattern)
    except WorkFailed as error:
        print(f"note: base has no such benchmarks of its own ({error})", file=sys.stderr)
        return []


def measure_sides(
    roots: dict[str, Path], processes: int, arguments: list[str], label: str, seed: int
) -> dict[str, store.Content]:
    """`run` with these arguments in so many fresh processes a side, in pairs of random order: ABBA-like."""
    contents: dict[str, list[store.Content]] = {side: [] for side in roots}
    order = random.Random(seed)  # noqa: S311 (no secret)
    with Bar(label, processes * len(roots), "processes/s") as bar:
        for process in range(processes):
            for side in order.sample(list(roots), len(roots)):
                try:
                    contents[side].append(run_child(roots[side], process, arguments))
                except (BadInput, WorkFailed) as error:
                    raise WorkFailed(f"{side}: a process ended without a result ({error})") from error
                bar.update(sum(map(len, contents.values())), side)
    return {side: merged(several) for side, several in contents.items()}
