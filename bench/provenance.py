"""Whether what a process imported and loaded is the code of the commit that it measures: if not, it measured nothing.

Checked after the suite was imported and again after it was measured, in processes that the suite started too.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

from bench import imports, project
from bench.imports import LOADED, is_compiled
from bench.packages import OURS, ROOT
from bench.project import ASIDE, NATIVE, RECIPES, Side

REFUSED = "refused-"


def check() -> None:
    """Raise WorkFailed, naming module and file, if one is not the checkout's. Does nothing where none is measured."""
    wrong = trouble()
    if wrong is not None:
        from ddpm.errors import WorkFailed  # not above: this is imported before everything else

        raise WorkFailed(wrong)


def note() -> None:
    """The same at the end of a process that the suite has started: what is wrong is left for the one that measures."""
    wrong = trouble()
    if wrong is not None:
        Path(project.side().made, f"{REFUSED}{os.getpid()}").write_text(wrong, encoding="utf-8")


def trouble() -> str | None:
    """What is not the checkout's, with module and file; None if all is, or if this process measures none."""
    side = project.side()
    if side is None:
        return None
    finder = imports.finder()
    for name, (file, why) in (finder.refused if finder else {}).items():
        return f"module {name}: {file} {why}"
    native = [file for file in side.files if file.endswith(NATIVE)]
    for name, module in sys.modules.copy().items():
        file = _file_of(module)
        why = None if file is None else _why(side, name, file, native)
        if why is not None:
            return f"module {name}: {file} {why}"
    for file in _mapped():
        why = _why_mapped(side, file, native)
        if why is not None:
            return f"library {file} {why}"
    left = sorted(Path(side.made).glob(f"{REFUSED}*"))
    return left[0].read_text(encoding="utf-8") if left else None


def _file_of(module: object) -> str | None:
    """The file of a module by its spec: a module may say anything of itself, and load more when it is asked."""
    facts = module.__dict__ if isinstance(module, ModuleType) else {}
    file = getattr(facts.get("__spec__"), "origin", None) or facts.get("__file__")
    return file if isinstance(file, str) and os.path.isabs(file) else None  # noqa: PTH117


def _why(side: Side, name: str, file: str, native: list[str]) -> str | None:
    if name.partition(".")[0] in OURS and file.startswith(str(ROOT)):
        return None  # the runner's, wherever it is installed
    place = side.place(file)
    if place == "repository":
        return f"lies in the working tree, not in the checkout of {side.side}"
    if place == "checkout":
        return _why_old(side, file, native) if is_compiled(file) else None
    return _why_elsewhere(side, name, file, native)


def _why_elsewhere(side: Side, name: str, file: str, native: list[str]) -> str | None:
    top, _, rest = name.partition(".")
    if top in (*OURS, "__main__") or top in sys.stdlib_module_names:
        return None
    by_runner = top in os.environ.get(LOADED, "").split(",")
    homes = [home for home in side.homes(name) if not (by_runner and ASIDE & set(home.parts))]
    if homes and project.is_of(side, name, file, homes, by_distribution=by_runner):
        return f"is a copy of {homes[0]}, which this process does not import from the checkout of {side.side}"
    if not is_compiled(file) or not native or by_runner:
        return None
    parent = sys.modules.get(top)
    parent_file = _file_of(parent) if rest else None
    if parent_file is not None and side.place(parent_file) == "checkout":
        return f"is not of the checkout of {side.side}, as its package is: a build has to make it"
    stem = name.rpartition(".")[2]
    named = any(Path(source).stem == stem for source in native) or any(
        stem in Path(side.folder, recipe).read_text(encoding="utf-8", errors="replace")
        for recipe in side.files
        if Path(recipe).name in RECIPES
    )
    nobodys = not rest and not project.owners_of(file, name)
    if named and (nobodys or project.is_of(side, name, file, [])):
        return f"is an installed copy of what {side.side} compiles: a build has to make it"
    return None


def _why_old(side: Side, file: str, native: list[str]) -> str | None:
    """What is wrong with a compiled file of the checkout: that no build made it, or that its source is newer."""
    made = os.stat(file).st_mtime_ns  # noqa: PTH116
    if native and made < side.complete_ns:
        return f"was not built from the sources of {side.side} (they are compiled by a build command only)"
    stem = Path(file).name.partition(".")[0]
    for source in native:
        if Path(source).stem == stem and Path(side.folder, source).stat().st_mtime_ns > made:
            return f"is older than its source {source}"
    return None


def _mapped() -> list[str]:
    """Files that this process executes code from, where the system tells: libraries of ctypes and of PyTorch too."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    lines = (line.split(maxsplit=5) for line in maps.read_text(errors="replace").splitlines())
    files = (line[5].removesuffix(" (deleted)") for line in lines if len(line) == 6 and "x" in line[1])
    return list(dict.fromkeys(file for file in files if file.startswith("/")))


def _why_mapped(side: Side, file: str, native: list[str]) -> str | None:
    place = side.place(file)
    if place == "repository":
        return f"is loaded from the working tree, not from the checkout of {side.side}: a build has to make it"
    return _why_old(side, file, native) if place == "checkout" and Path(file).exists() else None
