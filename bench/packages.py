"""Whose package a name is. A repository that is measured may have folders that are called as our packages are.

A name is one package in a process, and of OURS it is ours. A file of another repository that imports one of these
names, and that has it itself, would get ours in its place: `refuse_clashes` makes that an error.
"""

import atexit
import builtins
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("bench", "ddpm", "export", "kernels")
PROJECT = "fused-ddpm"
# A checkout, or the site-packages that a wheel was installed into.
ROOT = Path(__file__).resolve().parent.parent


class OursFirst:
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


# Run by every Python process that is started with `make_runner`'s folder in PYTHONPATH, before its own code.
IN_EVERY_PROCESS = """import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.util import module_from_spec

finders = sys.meta_path[:]
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]  # what is installed may have a bench of its own
from bench import packages
sys.meta_path[:] = finders
packages.install()
packages.follow()
theirs = PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != __file__.rpartition("/")[0]])
if theirs is not None and theirs.loader is not None:
    theirs.loader.exec_module(module_from_spec(theirs))
"""


def make_runner(folder: Path, following: bool = False) -> None:
    """Make a folder with our packages and nothing else, for the front of PYTHONPATH.

    Not ROOT itself: in site-packages lies, often enough, an installed copy of what is measured. following: processes
    that a measuring one starts import what it does.
    """
    folder.mkdir(exist_ok=True)
    for name in OURS:
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    if following:
        (folder / "sitecustomize.py").write_text(IN_EVERY_PROCESS, encoding="utf-8")


@contextmanager
def runner() -> Iterator[Path]:
    """The folder of `make_runner`, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-ours-") as folder:
        make_runner(Path(folder))
        yield Path(folder)


def follow() -> None:
    """In a process that a measuring one has started: import from the same checkout, say at its end what did not."""
    from bench import imports, provenance  # which import this

    if imports.LOADED in os.environ and imports.begin():
        atexit.register(provenance.note)


def _in(places: Sequence[Path], name: str) -> Path | None:
    """Where the module of this dotted name lies in one of these folders, if it is not ours."""
    ours = ROOT.joinpath(*name.split(".")).resolve()
    for place in places:
        path = place.joinpath(*name.split("."))
        found = next((one for one in (path, path.with_name(f"{path.name}.py")) if one.exists()), None)
        if found is not None and found.resolve().with_suffix("") != ours:
            return found
    return None


def _lies(place: Path, name: str) -> bool:
    path = place.joinpath(*name.split("."))
    return path.exists() or path.with_name(f"{path.name}.py").exists()


def _clash(places: Sequence[Path], name: str, wanted: Sequence[str]) -> Path | None:
    """Theirs, where `import name`, or `from name import wanted`, may mean it as well as ours.

    Not where ours lacks it, for then theirs is found beside ours; nor where theirs is a folder that is no package, or
    says nothing of what is wanted.
    """
    theirs = _in(places, name)
    file = None if theirs is None else theirs if theirs.is_file() else theirs / "__init__.py"
    if file is None or not file.is_file() or not _lies(ROOT, name):
        return None
    text, module = file.read_text(encoding="utf-8", errors="replace"), import_module(name)
    for one in wanted:
        beside = _in(places, f"{name}.{one}") is not None
        is_theirs = beside or re.search(rf"\b{re.escape(one)}\b", text) is not None
        is_ours = _lies(ROOT, f"{name}.{one}") or hasattr(module, one)
        if is_theirs if is_ours else not beside:
            return theirs
    return None if wanted else theirs


def refuse_clashes(folder: Path, suite: Path, places: Sequence[Path] = ()) -> None:
    """From now on raise BadInput where the suite, or a file in `folder`, imports a name that folder has as well as we.

    places: where its packages lie [folder, folder/src]. What only one of the two has is found: `kernels.backend`
    beside a folder kernels/ without a backend.py, and `bench.common` of theirs, which ours lacks. Not seen:
    importlib.import_module. Does nothing in a checkout of ours, or where no folder has a name of ours.
    """
    places = [place for place in places or (folder, folder / "src") if not place.is_relative_to(ROOT)]
    places = [place for place in places if not is_ours(place)]  # a submodule of theirs
    if is_ours(folder) or not any(_in(places, name) for name in OURS):
        return
    from ddpm.errors import BadInput  # not above: nothing of ours is imported before `install`

    def is_theirs(file: Path) -> bool:
        installed = "site-packages" in file.parts or any(file.is_relative_to(ROOT / name) for name in OURS)
        return file == suite or (file.is_relative_to(folder) and not installed)

    plain = builtins.__import__

    def checked(name: str, *rest: Any, **more: Any) -> ModuleType:
        scope = rest[0] if rest else more.get("globals")
        wanted = (rest[2] if len(rest) > 2 else more.get("fromlist")) or ()
        relative = rest[3] if len(rest) > 3 else more.get("level", 0)
        if not relative and name.partition(".")[0] in OURS and scope and "__file__" in scope:
            importer = Path(scope["__file__"]).resolve()
            theirs = _clash(places, name, wanted) if is_theirs(importer) else None
            if theirs is None and is_theirs(importer):
                _extend(name.partition(".")[0], places)
            elif theirs is not None:
                raise BadInput(
                    f"{importer.name}: imports {name}, which is {theirs} and, of fused-ddpm, "
                    f"{ROOT.joinpath(*name.split('.'))}: a process can have one of them, the former needs another name"
                )
        return plain(name, *rest, **more)

    builtins.__import__ = checked


def _extend(name: str, places: Sequence[Path]) -> None:
    """What our package of this name lacks is looked for in theirs."""
    path = import_module(name).__path__
    path += [str(place / name) for place in places if (place / name).is_dir() and str(place / name) not in path]


def install() -> None:
    """Put OursFirst before all other finders."""
    if OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, OursFirst)
