"""Two git refs side by side: unpacked into temporary folders, measured by the same runner in interleaved processes.

The runner is this checkout's bench/, copied over each side's, so that both do exactly the same work; it imports each
side's own ddpm/, kernels/ and export/. Where base lacks a name that the benchmarks of head import (a new operator),
base runs the benchmarks that it came with, and that is said.

Of another project nothing is replaced: our four packages come first, whatever that project's folders are called, and
its own packages from each side.
"""

import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from bench import machine, packages, store
from bench.machine import RESULTS
from bench.packages import OURS
from bench.run import PYTHON, environment, merged, run_child
from ddpm.command_line import debugging
from ddpm.errors import BadInput, WorkFailed
from ddpm.progress import Bar


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
    paths = (
        ["--", *OURS, f":(exclude){RESULTS}"] if packages.is_ours(machine.repository()) else ["--untracked-files=no"]
    )
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


# With all that `run` imports: what a side lacks of it must show before anything is measured.
LIST = """import sys
import bench.cli
from bench.registry import selected
for workload in selected(sys.argv[1], bool(sys.argv[2]), sys.argv[3])[0]:
    print(workload.name)
"""


def _paths(root: Path, ours: Path | None) -> list[Path]:
    return [path for path in (ours, root, root / "src") if path is not None]


def _names(root: Path, suite: str, quick: bool, pattern: str, ours: Path | None = None) -> list[str]:
    """The workloads that a side's benchmarks select. Raises WorkFailed with the reason if they cannot be listed."""
    command = [*PYTHON, "-c", LIST, suite, "1" if quick else "", pattern]
    done = subprocess.run(  # noqa: S603
        command, cwd=root, env=environment(_paths(root, ours)), capture_output=True, text=True, check=False
    )
    if debugging():
        sys.stderr.write(done.stderr)
    if done.returncode:
        raise WorkFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.splitlines()


@dataclass(frozen=True)
class Checkouts:
    """roots: {"base": folder, "head": folder}. gone: workloads that base knows and head does not.

    ours: the folder of `packages.runner` if they are another project's.
    """

    roots: dict[str, Path]
    gone: list[str]
    ours: Path | None = None


@contextmanager
def checkouts(base: str, head: str, suite: str, quick: bool, pattern: str) -> Iterator[Checkouts]:
    """Two commits under this runner; the folders are removed afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-bench-"))).resolve()
        roots = {"base": folder / "base", "head": folder / "head"}
        for root, commit in zip(roots.values(), (base, head), strict=True):
            _unpack(commit, root)
        if packages.is_ours(machine.repository()):
            yield Checkouts(roots, _replace_benchmarks(roots, suite, quick, pattern))
            return
        ours = stack.enter_context(packages.runner())
        names = {}
        for side, root in roots.items():
            try:
                names[side] = _names(root, suite, quick, pattern, ours)
            except WorkFailed as error:
                raise WorkFailed(f"{side} cannot be measured: {error}") from error
        yield Checkouts(roots, [name for name in names["base"] if name not in names["head"]], ours)


def _replace_benchmarks(roots: dict[str, Path], suite: str, quick: bool, pattern: str) -> list[str]:
    """Put this bench/ over each side's. Returns the workloads that base's own knows and head's does not."""
    known, names = [], {}
    for side, root in roots.items():
        own = root / "bench"
        if side == "base":
            known = _own_names(root, suite, quick, pattern)
        if own.exists():
            own.rename(root / "bench.own")
        shutil.copytree(packages.ROOT / "bench", own, ignore=shutil.ignore_patterns("results", "__pycache__"))
        try:
            names[side] = _names(root, suite, quick, pattern)
        except WorkFailed as error:
            if side == "head" or not known:
                raise WorkFailed(f"{side} cannot be measured: {error}") from error
            print(f"note: base runs its own benchmarks, head's need what it lacks ({error})", file=sys.stderr)
            shutil.rmtree(own)
            (root / "bench.own").rename(own)
    return [name for name in known if name not in names["head"]]


def _own_names(root: Path, suite: str, quick: bool, pattern: str) -> list[str]:
    """What base's own benchmarks would run: what is not in head's any more has disappeared."""
    try:
        return _names(root, suite, quick, pattern)
    except WorkFailed as error:
        print(f"note: base has no such benchmarks of its own ({error})", file=sys.stderr)
        return []


def measure_sides(
    found: Checkouts, processes: int, arguments: list[str], label: str, seed: int
) -> dict[str, store.Content]:
    """`run` with these arguments in so many fresh processes a side, in pairs of random order: ABBA-like."""
    roots = found.roots
    contents: dict[str, list[store.Content]] = {side: [] for side in roots}
    order = random.Random(seed)  # noqa: S311 (no secret)
    with Bar(label, processes * len(roots), "processes/s") as bar:
        for process in range(processes):
            for side in order.sample(list(roots), len(roots)):
                try:
                    contents[side].append(
                        run_child(roots[side], process, arguments, paths=_paths(roots[side], found.ours))
                    )
                except (BadInput, WorkFailed) as error:
                    raise WorkFailed(f"{side}: a process ended without a result ({error})") from error
                bar.update(sum(map(len, contents.values())), side)
    return {side: merged(several) for side, several in contents.items()}
