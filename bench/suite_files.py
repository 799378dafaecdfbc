"""A suite of another project: the import of its FILE.py, and where in the user's files it went wrong if it did."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from bench import imports, machine, packages, project, status
from ddpm.command_line import show_trace
from ddpm.errors import BadInput, WorkFailed

NOT_THEIRS = {"site-packages", "dist-packages"}


class Unavailable(Exception):
    """A suite that this installation cannot run: says what is missing."""


def is_file(suite: str) -> bool:
    """Whether it is a suite of another project."""
    return suite.endswith(".py")


def located(suite: str) -> str:
    """The suite as processes in other folders find it: a file by its whole path, a name as it is."""
    return str(Path(suite).resolve()) if is_file(suite) else suite


def refuse_absent(suite: str) -> None:
    """Raise BadInput if a suite's file does not exist."""
    if not Path(suite).is_file():
        raise BadInput(f"--suite: {suite}: no such file")


def shown(path: Path) -> str:
    """A file as messages name it: from the working directory if it lies there."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def import_folders(suite: Path) -> list[Path]:
    """Where a suite's imports are looked for: the working directory, the repository's top, their src/, its own folder.

    Its own not where it is ours: bench/suites has names such as export.
    """
    tops = dict.fromkeys((Path.cwd(), machine.repository()))
    own = [] if suite.is_relative_to(packages.ROOT / "bench") else [suite.parent]
    return [*(folder for top in tops for folder in (top, top / "src")), *own]


def _is_theirs(file: Path) -> bool:
    """Whether a line of a traceback is the user's own: not Python's, of no package that is installed, and not ours."""
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    ours = {packages.ROOT / name for name in packages.OURS}
    file = file.resolve()
    return file.is_file() and not (NOT_THEIRS & set(file.parts) or any(map(file.is_relative_to, library | ours)))


def _place_of(error: BaseException, suite: Path) -> str:
    """Where it went wrong: "speed.py:3", or deeper "lib/mine.py:10, imported by speed.py:3"."""
    lines = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((Path(error.filename), error.lineno))
    lines = [(file, line) for file, line in lines if file.resolve() == suite or _is_theirs(file)]
    places = [f"{shown(file)}:{line}" for file, line in lines] or [shown(suite)]
    first = next((place for place in places if place.startswith(shown(suite))), shown(suite))
    return places[-1] if first == places[-1] or lines[-1][0].resolve() == suite else f"{places[-1]}, from {first}"


@contextmanager
def explained(suite: Path) -> Iterator[None]:
    """What is raised in the block, which runs the user's code, becomes WorkFailed with file and line."""
    try:
        yield
    except (BadInput, WorkFailed, Unavailable):
        raise
    except (Exception, SystemExit) as error:
        show_trace(error)
        text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        raise WorkFailed(f"{_place_of(error, suite)}: {type(error).__name__}: {text}") from error


@cache
def module_in(path: Path) -> ModuleType:
    """The module of a suite's file, imported once a process. Raises BadInput if it is no suite."""
    refuse_absent(str(path))
    packages.install()  # before its folders come into sys.path, which may have a kernels/ of their own
    if not imports.begin():  # a checkout's processes are told where its modules are
        for folder in reversed(import_folders(path)):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
    side = project.side()
    places = import_folders(path) if side is None else side.folders_of(packages.OURS)
    packages.refuse_clashes(machine.repository(), path, places)
    # Not its plain name, which may be that of a package it measures; in sys.modules, as dataclasses and pickle need.
    name = f"suite_{path.stem}"
    while name in sys.modules:
        name += "_"
    spec = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)
    status.say(f"importing {shown(path)}")
    with explained(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "workloads"):
        raise BadInput(f"--suite: {shown(path)}: has no workloads(quick) -> list[Workload]")
    return module
