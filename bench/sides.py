"""Two git refs side by side: unpacked into temporary folders, measured by the same runner in interleaved processes.

The runner is this checkout's bench/, copied over each side's, so that both do exactly the same work; it imports each
side's own ddpm/, kernels/ and export/. Where base lacks a name that the benchmarks of head import (a new operator),
base runs the benchmarks that it came with, and that is said.

Of another project nothing is replaced: our four packages come first, whatever that project's folders are called, and
its own packages from each side.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from bench import children, machine, packages
from bench.children import TIMEOUT, environment
from bench.machine import RESULTS
from bench.packages import OURS
from bench.registry import expression_of
from ddpm.errors import BadInput, WorkFailed


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


# With all that `run` imports: what a side lacks of it must show before anything is measured. One suite a process, and
# no filter: benchmarks of base's own know no more.
LIST = """import sys
import bench.run
from bench.registry import selected
for workload in selected(sys.argv[1], bool(sys.argv[2]), "")[0]:
    print(workload.name)
"""


def _paths(root: Path, ours: Path | None) -> list[Path]:
    return [path for path in (ours, root, root / "src") if path is not None]


def _names(
    root: Path, suites: Sequence[str], quick: bool, pattern: str, ours: Path | None = None, side: str = ""
) -> list[str]:
    """The workloads that a side's benchmarks select. Raises WorkFailed or BadInput if they cannot be listed."""
    expression, names = expression_of(pattern), []
    for suite in suites:
        arguments = ["-c", LIST, suite, "1" if quick else ""]
        done = children.python(arguments, root, environment(_paths(root, ours)), timeout=TIMEOUT, side=side)
        if done.code:
            raise done.error(side)
        names += done.output.splitlines()
    found = [name for name in names if expression.search(name)]
    if not found:
        raise BadInput(f"--filter: {pattern!r} matches none of: {'; '.join(names)}")
    return found


@dataclass(frozen=True)
class Checkouts:
    """roots: {"base": folder, "head": folder}. gone: workloads that base knows and head does not.

    ours: the folder of `packages.runner` if they are another project's.
    """

    roots: dict[str, Path]
    gone: list[str]
    ours: Path | None = None

    def paths(self, side: str) -> list[Path]:
        """What comes first in a side's PYTHONPATH."""
        return _paths(self.roots[side], self.ours)


@contextmanager
def checkouts(base: str, head: str, suites: Sequence[str], quick: bool, pattern: str) -> Iterator[Checkouts]:
    """Two commits under this runner; the folders are removed afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-bench-"))).resolve()
        roots = {"base": folder / "base", "head": folder / "head"}
        for root, commit in zip(roots.values(), (base, head), strict=True):
            _unpack(commit, root)
        if packages.is_ours(machine.repository()):
            yield Checkouts(roots, _replace_benchmarks(roots, suites, quick, pattern))
            return
        ours = stack.enter_context(packages.runner())
        names = {}
        for side, root in roots.items():
            names[side] = _names(root, suites, quick, pattern, ours, side)
        yield Checkouts(roots, [name for name in names["base"] if name not in names["head"]], ours)


def _replace_benchmarks(roots: dict[str, Path], suites: Sequence[str], quick: bool, pattern: str) -> list[str]:
    """Put this bench/ over each side's. Returns the workloads that base's own knows and head's does not."""
    known, names = [], {}
    for side, root in roots.items():
        own = root / "bench"
        if side == "base":
            known = _own_names(root, suites, quick, pattern)
        if own.exists():
            own.rename(root / "bench.own")
        shutil.copytree(packages.ROOT / "bench", own, ignore=shutil.ignore_patterns("results", "__pycache__"))
        try:
            names[side] = _names(root, suites, quick, pattern)
        except WorkFailed as error:
            if side == "head" or not known:
                raise WorkFailed(f"{side} cannot be measured: {error}") from error
            print(f"note: base runs its own benchmarks, head's need what it lacks ({error})", file=sys.stderr)
            shutil.rmtree(own)
            (root / "bench.own").rename(own)
    return [name for name in known if name not in names["head"]]


def _own_names(root: Path, suites: Sequence[str], quick: bool, pattern: str) -> list[str]:
    """What base's own benchmarks would run: what is not in head's any more has disappeared."""
    try:
        return _names(root, suites, quick, pattern)
    except WorkFailed as error:
        print(f"note: base has no such benchmarks of its own ({error})", file=sys.stderr)
        return []
