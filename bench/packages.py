"""Whose package a name is. A repository that is measured may have folders that are called as our packages are.

A name is one package in a process, and of OURS it is ours. A file of another repository that imports one of these
names, and that has it itself, would get ours in its place: `refuse_clashes` makes that an error.
"""

import builtins
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("bench", "ddpm", "export", "kernels")
PROJECT = "fused-ddpm"
# A checkout, or the site-packages that a wheel was installed into.
ROOT = Path(__file__).resolve().parent.parent


class OursFirst(MetaPathFinder):
    """Finds our packages beside this one, whatever comes before them in PYTHONPATH or lies in the working directory."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of one of OURS; None for everything else."""
        return PathFinder.find_spec(fullname, [str(ROOT)], target) if fullname in OURS else None


def is_ours(folder: Path) -> bool:
    """Whether a checkout is one of this project: the one that runs, or its pyproject.toml is told."""
    if folder == ROOT:
        return True
    try:
        text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text).get("project", {}).get("name") == PROJECT
    except (OSError, ValueError):  # none, or none that can be read
        return False


@contextmanager
def runner() -> Iterator[Path]:
    """A folder with our packages and nothing else, for the front of PYTHONPATH.

    Not ROOT itself: in site-packages lies, often enough, an installed copy of what is measured.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-ours-") as folder:
        for name in OURS:
            (Path(folder) / name).symlink_to(ROOT / name, target_is_directory=True)
        yield Path(folder)


def _in(places: Sequence[Path], name: str) -> Path | None:
    """Where the module of this dotted name lies in one of these folders, if it is not ours."""
    ours = ROOT.joinpath(*name.split(".")).resolve()
    for place in places:
        path = place.joinpath(*name.split("."))
        found = next((one for one in (path, path.with_name(f"{path.name}.py")) if one.exists()), None)
        if found is not None and found.resolve().with_suffix("") != ours:
            return found
    return None


def refuse_clashes(folder: Path, suite: Path) -> None:
    """From now on raise BadInput where the suite, or a file in `folder`, imports a name that folder has as well as we.

    What only one of the two has is found as ever: `kernels.backend` beside a folder kernels/ without a backend.py.
    Not seen: importlib.import_module. Does nothing in a checkout of ours, or where no folder has a name of ours.
    """
    places = [folder, folder / "src"]
    if is_ours(folder) or not any(_in(places, name) for name in OURS):
        return
    from ddpm.errors import BadInput  # not above: nothing of ours is imported before `install`

    def is_theirs(file: Path) -> bool:
        installed = "site-packages" in file.parts or any(file.is_relative_to(ROOT / name) for name in OURS)
        return file == suite or (file.is_relative_to(folder) and not installed)

    plain = builtins.__import__

    def checked(name: str, *rest: Any, **more: Any) -> ModuleType:
        scope = rest[0] if rest else more.get("globals")
        relative = rest[3] if len(rest) > 3 else more.get("level", 0)
        if not relative and name.partition(".")[0] in OURS and scope and "__file__" in scope:
            importer, theirs = Path(scope["__file__"]).resolve(), _in(places, name)
            if theirs is not None and is_theirs(importer):
                raise BadInput(
                    f"{importer.name}: imports {name}, which is {theirs} and, of fused-ddpm, "
                    f"{ROOT.joinpath(*name.split('.'))}: the former needs another name"
                )
        return plain(name, *rest, **more)

    builtins.__import__ = checked


def install() -> None:
    """Put OursFirst before all other finders."""
    if OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, OursFirst)
