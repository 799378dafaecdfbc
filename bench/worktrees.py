"""A commit as a working tree of its own, with its submodules: what git itself would check out, and never the network.

The repository is left as it was: a working tree is registered in it while it lasts, and no ref is made.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine, packages
from bench.machine import RESULTS
from bench.packages import OURS
from ddpm.errors import BadInput

# No hook runs, nothing but the commit's own files decides what is checked out.
PLAIN = ("core.hooksPath=/dev/null", "core.sparseCheckout=false", "core.fsmonitor=false", "submodule.recurse=false")
SHALLOW = "this clone is shallow: fetch the whole history (git fetch --unshallow, or fetch-depth: 0 of the checkout)"
GITLINK = "160000"


def _git(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    done = machine.git(*arguments, folder=folder)
    if done is None:
        raise BadInput("git refs were given, needs git in the PATH or two stored files")
    return done


def _line(done: subprocess.CompletedProcess[bytes]) -> str:
    """What git said, in its own words: the line that says what is wrong."""
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return (wrong or lines or [f"git ended with exit code {done.returncode}"])[0]


def said(*arguments: str, folder: Path | None = None) -> str:
    """What git prints. Raises BadInput with git's own line if it fails."""
    done = _git(*arguments, folder=folder)
    if done.returncode:
        raise BadInput(_line(done))
    return done.stdout.decode(errors="surrogateescape")


def commit_of(ref: str) -> str:
    """The full hash of a ref. Raises BadInput if there is none of that name here."""
    there = _git("rev-parse", "--is-shallow-repository")
    if there.returncode:
        raise BadInput(f"{ref}: not a file, and git says of {machine.repository()}: {_line(there)}")
    found = _git("rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode:
        shallow = f"; {SHALLOW}" if there.stdout.strip() == b"true" else ""
        raise BadInput(f"{ref}: neither a file nor a commit of this repository ({_line(found)}){shallow}")
    return found.stdout.decode().strip()


def refuse_dirty() -> None:
    """Raise BadInput if what is measured has changes that no ref contains: of another project, any tracked file."""
    paths = (
        ["--", *OURS, f":(exclude){RESULTS}"] if packages.is_ours(machine.repository()) else ["--untracked-files=no"]
    )
    changed = said("status", "--porcelain", *paths).splitlines()
    if changed:
        raise BadInput(
            f"{changed[0][3:]}: is changed in no ref ({len(changed)} such file(s)), needs a commit or a stash, or"
            " two stored files"
        )


@dataclass
class Worktree:
    """A commit's files in `folder`. files: the tracked ones, relative, those of its submodules too.

    absent: {path: commit} of submodules that this clone has not fetched.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Worktree]:
    """A commit of the repository in a new folder, removed afterwards with all that was made in it."""
    top = machine.repository()
    stores = [_path(top, said("rev-parse", option)) for option in ("--git-dir", "--git-common-dir")]
    with ExitStack() as stack:
        found = Worktree(folder)
        _add(stack, found, stores[1], commit, Path(), top, [store / "modules" for store in stores])
        yield found


def _path(folder: Path, text: str) -> Path:
    return (folder / text.removesuffix("\n")).resolve()


def _add(
    stack: ExitStack, found: Worktree, store: Path, commit: str, place: Path, working: Path, modules: list[Path]
) -> None:
    """A commit of a store (a git directory) at `place` in the working tree, and its submodules in theirs.

    working: where the user has it checked out. modules: where the stores of its submodules may lie.
    """
    folder = found.folder / place
    # A submodule's store names a folder as its working tree, which need not exist any more: any that does will do.
    in_store = [f"--git-dir={store}", f"--work-tree={found.folder.parent}"]
    config = [word for setting in PLAIN for word in ("-c", setting)]
    stack.callback(_remove, in_store, folder, store)  # before it is there: what is stopped meanwhile leaves a part
    done = _git(*in_store, *config, "worktree", "add", "--detach", str(folder), commit, folder=store)
    if done.returncode:
        where = f"submodule {place}: " if place.parts else ""
        raise BadInput(f"{where}{_line(done)}")
    links = {}
    for entry in said("ls-files", "--stage", "-z", folder=folder).split("\0")[:-1]:
        facts, _, name = entry.partition("\t")
        mode, pinned, _ = facts.split(" ")
        if mode == GITLINK:
            links[name] = pinned
        else:
            found.files.append((place / name).as_posix())
    names = _names_of(folder) if links else {}
    for path, pinned in links.items():
        inner = _store(names.get(path, path), working / path, modules)
        if inner is None:
            found.absent[(place / path).as_posix()] = pinned
        else:
            _add(stack, found, inner, pinned, place / path, working / path, [inner / "modules"])


def _remove(in_store: list[str], folder: Path, store: Path) -> None:
    _git(*in_store, "worktree", "remove", "--force", "--force", str(folder), folder=store)
    shutil.rmtree(folder, ignore_errors=True)  # what git left: a folder that a build made read-only, say


def _names_of(folder: Path) -> dict[str, str]:
    """{path: name} of the submodules that .gitmodules names."""
    done = _git("config", "--file", ".gitmodules", "-z", "--get-regexp", r"^submodule\..*\.path$", folder=folder)
    pairs = (entry.split("\n", 1) for entry in done.stdout.decode(errors="surrogateescape").split("\0") if entry)
    return {path: key.removeprefix("submodule.").removesuffix(".path") for key, path in pairs}


def _store(name: str, working: Path, modules: list[Path]) -> Path | None:
    """The git directory of a submodule of this name: among the repository's modules, or inside its working tree."""
    for folder in modules:
        if (folder / name / "HEAD").is_file():
            return folder / name
    if not (working / ".git").exists():
        return None
    return _path(working, said("rev-parse", "--git-common-dir", folder=working))
