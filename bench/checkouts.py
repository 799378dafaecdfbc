"""Two commits beside each other: each checked out, built and listed, ready for the processes that measure it.

Of our own repository both sides run this bench/, laid over each side's, and import that side's ddpm/, kernels/ and
export/. Of another project nothing is replaced but the suite: our four packages come first, whatever that project's
folders are called, and its own from each side (`bench.imports`).

Both sides run head's version of a suite, so that both do the same work. Base's own is listed before: what it has and
head has not is gone. Where head's needs what base lacks (a new function), base runs its own, and that is said: when it
is imported, or when a row that base's own version measures does not run in base.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench import config, machine, packages, project, store
from bench.build import build as build_in
from bench.children import TIMEOUT, environment, python, run_child
from bench.project import Side
from bench.registry import expression_of
from bench.suite_files import is_file, refuse_absent
from bench.worktrees import Worktree, commit_of, refuse_dirty, said, worktree
from ddpm.errors import BadInput, WorkFailed

__all__ = ["Checkout", "Checkouts", "checkouts", "commit_of", "refuse_dirty"]

# What makes something once and keeps it under a name that both sides may share.
CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR", "CUPY_CACHE_DIR")

# Seconds after which a file system's clock, which advances in steps, has moved on.
CLOCK = 0.05

# With all that `run` imports: what a side lacks of it must show before anything is measured. One suite a process, and
# no filter: benchmarks of base's own know no more.
LIST = """import json, sys
from importlib.util import find_spec
from pathlib import Path
import bench.run
from bench.registry import selected
names = [workload.name for workload in selected(sys.argv[1], bool(sys.argv[2]), "")[0]]
if find_spec("bench.provenance"):
    from bench import provenance
    provenance.check()
Path(sys.argv[3]).write_text(json.dumps(names))
"""


@dataclass(frozen=True)
class Checkout:
    """A side as its processes see it.

    root: the commit's files. folder: in which they run, the user's working directory in it. paths: for PYTHONPATH.
    extra: variables of their environment. suites: as they find them.
    """

    root: Path
    folder: Path
    paths: tuple[Path, ...]
    extra: Mapping[str, str]
    suites: tuple[str, ...]


@dataclass(frozen=True)
class Checkouts:
    """sides: {"base": ..., "head": ...}. gone: workloads that base's own suites have, and head's have not, and rows of
    the others. new: workloads that head's have, and base's own have not."""

    sides: dict[str, Checkout]
    gone: list[str]
    new: list[str]


@dataclass(frozen=True)
class _Suites:
    """Suites that share what both sides run: `source`, laid over `place` in a checkout; None where it lies outside.

    names: of ours, or one file, relative to the checkout's top where it is tracked.
    """

    names: tuple[str, ...]
    place: Path | None = None
    source: Path | None = None

    def within(self, root: Path) -> list[str]:
        """As the processes of a checkout find them."""
        return [str(root / name) if is_file(name) else name for name in self.names]

    def lay(self, root: Path) -> None:
        """Put it over a checkout's own."""
        if self.place is None or self.source == root / self.place:
            return
        own = root / self.place
        own.parent.mkdir(parents=True, exist_ok=True)
        if own.exists():
            own.rename(_aside(own))
        if self.source.is_dir():
            shutil.copytree(self.source, own, ignore=shutil.ignore_patterns("results", "__pycache__"))
        else:
            shutil.copyfile(self.source, own)

    def restore(self, root: Path) -> None:
        """Put a checkout's own back."""
        own = root / self.place
        if own.is_dir():
            shutil.rmtree(own)
        else:
            own.unlink()
        _aside(own).rename(own)


class _NotInBase(WorkFailed):
    """A suite that base has not and cannot run. names: what head has in it."""

    def __init__(self, error: WorkFailed, names: list[str]) -> None:
        super().__init__(str(error))
        self.names = names


def _aside(own: Path) -> Path:
    return own.with_name(f"{own.name}.own")


@contextmanager
def checkouts(
    base: str,
    head: str,
    suites: Sequence[str],
    quick: bool,
    pattern: str,
    build: str | None = None,
    timeout: float = TIMEOUT,
    configured: bool = False,
) -> Iterator[Checkouts]:
    """Two commits, checked out and built by `build` (None: as their projects declare); removed afterwards.

    suites: names of ours, or files by their whole path. timeout: seconds for listing one. configured: whether it was
    head's pyproject.toml that named them, so that what base's names counts as base's own too. Raises BadInput where git
    refuses, a suite is none or nothing matches, and WorkFailed, naming the side, where one cannot be built or listed.
    """
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-bench-"))).resolve()
        commits = {"base": base, "head": head}
        trees = {side: stack.enter_context(worktree(commit, top / side)) for side, commit in commits.items()}
        _refuse_unfetched(trees["base"].absent, trees["head"].absent)
        ours = packages.is_ours(machine.repository())
        shared = _shared(trees, suites, ours)
        if not ours:
            packages.make_runner(top / "ours", following=True)
        dropped = _dropped(trees["base"].folder, shared) if configured else []
        sides = {
            side: _checkout(side, top, trees, shared, build, ours, dropped if side == "base" else ()) for side in trees
        }
        expression = expression_of(pattern)
        found, added = [], {}
        for one in shared:
            try:
                found.append(_listed(sides, one, quick, expression, timeout))
            except _NotInBase as error:
                found.append(([], error.names, []))
                added[one] = error
        found += [(_own_names(sides["base"], one, quick, timeout), [], []) for one in dropped]
        known, now, lost = ([name for names in side for name in names] for side in zip(*found, strict=True))
        sides["base"] = _without(sides["base"], added, known)
        matching = [name for name in dict.fromkeys((*known, *now)) if expression.search(name)]
        if not matching:
            raise BadInput(f"--filter: {pattern!r} matches none of: {'; '.join(dict.fromkeys((*known, *now)))}")
        gone, new = ([name for name in matching if name not in there] for there in (now, known))
        yield Checkouts(sides, gone + lost, new)


def _refuse_unfetched(base: Mapping[str, str], head: Mapping[str, str]) -> None:
    """Raise WorkFailed if a submodule that is not here changed; say which are not."""
    for path in sorted({*base, *head}):
        if base.get(path) != head.get(path):
            raise WorkFailed(
                f"submodule {path}: is {base.get(path)} in base and {head.get(path)} in head, and is not fetched"
                " here, needs git submodule update --init"
            )
        print(f"note: submodule {path} is not fetched here, the same commit in base and head", file=sys.stderr)


def _without(base: Checkout, added: Mapping[_Suites, _NotInBase], known: Sequence[str]) -> Checkout:
    """Base without suites that head adds for what base lacks: their rows are new.

    Raises their error if base knows one of them from another suite, or has nothing else to run.
    """
    left = tuple(suite for suite in base.suites if all(suite not in one.within(base.root) for one in added))
    for one, error in added.items():
        if not left or {*error.names} & {*known}:
            raise error
        print(f"note: {', '.join(one.names)} is new, base cannot run it ({error})", file=sys.stderr)
    return replace(base, suites=left)


def _dropped(root: Path, shared: Sequence[_Suites]) -> list[_Suites]:
    """The suites that base's configuration names and that are not measured: removed, moved, or named no more."""
    here, repository = Path.cwd().resolve(), machine.repository().resolve()
    folder = root / here.relative_to(repository) if here.is_relative_to(repository) else root
    try:
        named = config.read(root, folder).suites
    except BadInput as error:
        print(f"note: base's own suites are not known ({error})", file=sys.stderr)
        return []
    files = [Path(name).resolve() for name in named if is_file(name)]
    places = [file.relative_to(root) for file in files if file.is_file() and file.is_relative_to(root)]
    measured = {name for one in shared for name in one.names}
    return [_Suites((str(place),), place) for place in dict.fromkeys(places) if str(place) not in measured]


def _shared(trees: Mapping[str, Worktree], suites: Sequence[str], ours: bool) -> list[_Suites]:
    """The suites with what both sides run."""
    named = tuple(suite for suite in suites if not is_file(suite))
    found = [_Suites(named, Path("bench"), packages.ROOT / "bench")] if named and ours else []
    top = machine.repository().resolve()
    for suite in map(Path, filter(is_file, suites)):
        if not suite.is_relative_to(top):
            refuse_absent(str(suite))
            found.append(_Suites((str(suite),)))
            continue
        place = suite.relative_to(top)
        sides = [side for side, tree in trees.items() if place.as_posix() in tree.files]
        if not sides:
            _copy_untracked(trees, suite, top)
        elif sides == ["base"]:
            raise WorkFailed(f"{place}: base has this suite, head has not: all its benchmarks are missing")
        found.append(_Suites((str(place),), place if sides else None, trees["head"].folder / place if sides else None))
    return found


def _copy_untracked(trees: Mapping[str, Worktree], suite: Path, top: Path) -> None:
    """An untracked suite into both checkouts, with what lies beside it untracked: links to what is no Python file."""
    if not suite.is_file():
        raise BadInput(f"--suite: {suite}: no such file, neither here nor in base or head")
    beside = said("ls-files", "--others", "--exclude-standard", "-z", "--", str(suite.parent)).split("\0")
    for name in dict.fromkeys((str(suite.relative_to(top)), *filter(None, beside))):
        file = top / name
        if project.is_installed(str(file), str(top)):
            continue
        for tree in trees.values():
            copy = tree.folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists() and file.suffix == ".py":
                shutil.copyfile(file, copy)
            elif not copy.exists():
                copy.symlink_to(file)


def _checkout(
    side: str,
    top: Path,
    trees: Mapping[str, Worktree],
    shared: Sequence[_Suites],
    build: str | None,
    ours: bool,
    dropped: Sequence[_Suites] = (),
) -> Checkout:
    """A side, built, with what its processes are told. dropped: suites that are listed there and not measured."""
    tree, made, repository = trees[side], top / f"{side}-made", machine.repository().resolve()
    root, built = tree.folder, made / "built"
    made.mkdir()
    extra = {name: str(made / "caches" / name.lower()) for name in (*CACHES, *(("FUSED_DDPM_CACHE",) if ours else ()))}
    compiles = any(file.endswith(project.NATIVE) for file in tree.files)
    # Some builds cut the times of what they make to whole seconds: setuptools up to 81, archives.
    time.sleep(1 - time.time() % 1 + CLOCK if compiles else CLOCK)
    (made / "complete").touch()
    complete = (made / "complete").stat().st_mtime_ns // 10**9 * 10**9
    build_in(side, root, tree.files, built, build, extra)
    here = Path.cwd().resolve()
    inside = root / here.relative_to(repository) if here.is_relative_to(repository) else root
    folder = inside if inside.is_dir() else root
    suites = [Path(name) for one in shared for name in one.within(root)]
    tops = [place for each in (folder, root) for place in (each, each / "src")]
    listed = [*suites, *(Path(name) for one in dropped for name in one.within(root))]
    places = [*built.glob("*"), *tops, *(suite.parent for suite in listed if is_file(suite.name))]
    kept = {name: [file for file in tree.files if _tells(file)] for name, tree in trees.items()}
    working = said("ls-files", "-z").split("\0")
    others = {file for files in (*kept.values(), working) for file in files if _tells(file)} - set(kept[side])
    imports = tuple(dict.fromkeys(str(place) for place in places if place.is_dir()))
    told = Side(
        side, str(repository), str(root), str(made), imports, tuple(kept[side]), tuple(sorted(others)), complete
    )
    told.write(made / "side.json")
    paths = (root,) if ours else (top / "ours",)
    return Checkout(root, folder, paths, extra | {project.VARIABLE: str(made / "side.json")}, tuple(map(str, suites)))


def _tells(file: str) -> bool:
    """Whether a measuring process needs to know of a tracked file."""
    return file.endswith((".py", *project.NATIVE)) or Path(file).name in project.RECIPES


def _listed(
    sides: Mapping[str, Checkout], suites: _Suites, quick: bool, expression: re.Pattern[str], timeout: float
) -> tuple[list[str], list[str], list[str]]:
    """The workloads that base's own version has and that head's has; both sides then have what they run.

    The third are rows of workloads of both, which base's own version measures and head's has not.
    """
    base, head = sides["base"], sides["head"]
    own = None if suites.place is None else base.root / suites.place
    if suites.place == Path("bench"):  # the runner itself
        suites.lay(head.root)
    names = _names("head", head, suites, quick, timeout)
    is_new = own is not None and not own.exists()
    known = _own_names(base, suites, quick, timeout) if own is not None and own.exists() else []
    if own is not None and own.is_file() and own.read_bytes() == suites.source.read_bytes():
        return known, names, []
    both = [name for name in known if name in names and expression.search(name)] if own and own.is_file() else []
    rows = _rows("base", base, suites, quick, both, timeout)
    ran = [row for row, wrong in rows.items() if wrong is None]
    there = _rows("head", head, suites, quick, both if ran else [], timeout)
    lost = [row for row in ran if row not in there]
    suites.lay(base.root)
    try:
        same = _names("base", base, suites, quick, timeout)
        here = _rows("base", base, suites, quick, both if ran else [], timeout)
        for row in ran:
            wrong = here.get(row, "not there")
            if row in there and wrong is not None:
                raise WorkFailed(f"base: {row}: {wrong}")
    except (BadInput, WorkFailed) as error:
        if not known:
            failed = WorkFailed(f"{error} (base has no benchmarks of its own to run instead)")
            raise (_NotInBase(failed, names) if is_new else failed) from error
        print(f"note: base runs its own benchmarks, head's need what it lacks ({error})", file=sys.stderr)
        suites.restore(base.root)
        return known, names, lost
    return known or same, names, lost


def _rows(
    side: str, checkout: Checkout, suites: _Suites, quick: bool, workloads: Sequence[str], timeout: float
) -> dict[str, str | None]:
    """The rows of some workloads, each with why it does not run; measured in one round, which is not kept."""
    if not workloads:
        return {}
    line = [word for suite in suites.within(checkout.root) for word in ("--suite", suite)]
    line += ["--filter", f"^({'|'.join(map(re.escape, workloads))})$", *(["--quick"] if quick else [])]
    line += ["--rounds", "1", "--no-ceilings"]
    where = {"paths": checkout.paths, "extra": checkout.extra, "side": side}
    records = run_child(checkout.folder, 0, line, timeout=timeout, **where)["records"]
    return {
        store.row_of(record): None if store.is_good(record) else record.get("failed", "parity lost")
        for record in records
    }


def _own_names(base: Checkout, suites: _Suites, quick: bool, timeout: float) -> list[str]:
    """What base's own version would run. Of our own suites, one that cannot be listed is new."""
    try:
        return _names("base", base, suites, quick, timeout)
    except (BadInput, WorkFailed) as error:
        if suites.place != Path("bench"):
            raise WorkFailed(f"{error} (base's own {suites.place})") from error
        print(f"note: base has no such benchmarks of its own ({error})", file=sys.stderr)
        return []


def _names(side: str, checkout: Checkout, suites: _Suites, quick: bool, timeout: float) -> list[str]:
    """The workloads of a side's suites, from processes like those that measure it."""
    found = []
    for suite in suites.within(checkout.root):
        with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
            out = Path(folder) / "names.json"
            told = environment(checkout.paths, extra=checkout.extra)
            line = ["-c", LIST, suite, "1" if quick else "", str(out)]
            ended = python(line, checkout.folder, told, timeout=timeout, side=side)
            if ended.code or not out.is_file():
                error = ended.error(side)
                # That a commit's own suite has nothing to measure, no argument can mend.
                empty = suites.place is not None and is_file(suite) and "--suite: " in str(error)
                raise WorkFailed(str(error)) if empty else error
            found += json.loads(out.read_text())
    return found
