"""What a process that measures a checkout imports: that checkout's files, however the project is installed.

A project's name leads to its working tree (every kind of editable install), to a copy in site-packages, or nowhere. In
a measuring process it leads to the checkout of the process's side: to the folders of its own, to the same relative
place as in the working tree, or to the one tracked home that the name has. `bench.provenance` checks the outcome.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from bench import project
from bench.packages import OURS, OursFirst
from bench.project import ASIDE, Side

# The variable with the names that the runner has imported: whatever the project has of these names, they stay.
LOADED = "DDPM_BENCH_LOADED"
# What had been imported before anything of ours could be: by lines in path files.
EARLY = frozenset(sys.modules)


def is_compiled(file: str) -> bool:
    """Whether it is an extension module."""
    return file.endswith(tuple(EXTENSION_SUFFIXES))


def _is_regular(spec: ModuleSpec | None) -> bool:
    """Whether it is a module or a package with a file, no portion of a namespace."""
    return spec is not None and spec.loader is not None and bool(spec.origin)


class CheckoutFirst(MetaPathFinder):
    """Finds a project's modules in the checkout. refused: {name: (file, why)} of what it would not import."""

    def __init__(self, side: Side, left: frozenset[str]) -> None:
        """left: names that are none of its business."""
        self.side, self.left = side, left
        self.refused: dict[str, tuple[str, str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of a module of the project in its checkout; of any other what the other finders say."""
        if fullname.partition(".")[0] in self.left:
            return None
        path = None if path is None else list(map(str, path))
        here = self.side.imports if path is None else [p for p in path if self.side.place(p) == "checkout"]
        ours = PathFinder.find_spec(fullname, here) if here else None
        if _is_regular(ours):
            return ours
        rest = self._rest(fullname, path, target)
        if _is_regular(rest):
            return self._checked(fullname, rest, path, here)
        home = self._home(fullname) if path is None else None
        if home is not None:
            return home
        namespace = self._namespace(fullname) if path is None else []
        portions = [*self._portions(ours), *namespace, *self._portions(rest)]
        if not portions:
            self._refuse_fallback(fullname, here)
            return rest
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = list(dict.fromkeys(portions))
        return spec

    def _rest(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """What the machinery would find without this finder."""
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        return next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)

    def _checked(
        self, name: str, spec: ModuleSpec, path: Sequence[str] | None, here: Sequence[str]
    ) -> ModuleSpec | None:
        """What was found outside the checkout's own folders, or what the checkout has in its place."""
        place = self.side.place(spec.origin)
        if place == "repository":
            return self._moved(name, spec)
        if place == "elsewhere" and path is None:
            return self._home(name, spec.origin) or spec
        if place == "elsewhere" and here and PathFinder.find_spec(name, path) is None:
            # Not where its package lies: a finder of an editable install keeps what it compiled somewhere else.
            self.refuse(name, spec.origin, f"is not of the checkout of {self.side.side}: a build has to make it")
        return spec

    def _moved(self, name: str, spec: ModuleSpec) -> ModuleSpec | None:
        """A module of the working tree at the same relative place of the checkout."""
        file = self.side.counterpart(spec.origin)
        if not file.is_file():
            relative = file.relative_to(self.side.folder).as_posix()
            if relative in self.side.others:  # of another commit, and nothing that this one lacks
                raise ModuleNotFoundError(
                    f"No module named {name!r} ({relative} is not in {self.side.side})", name=name
                )
            self.refuse(name, spec.origin, f"is not in the checkout of {self.side.side}: a build has to make it")
        places = None if spec.submodule_search_locations is None else self._portions(spec)
        if places is not None and file.stem == "__init__":
            places = list(dict.fromkeys((str(file.parent), *places)))
        return spec_from_file_location(name, file, submodule_search_locations=places)

    def _refuse_fallback(self, name: str, here: Sequence[str]) -> None:
        """Refuse a compiled module that is installed or built for the working tree, and not for the checkout.

        What does without it, since an import may fail, is not what users run.
        """
        package = name.split(".")[:-1]
        places = [str(self.side.origin(p)) for p in here if p.startswith(self.side.folder)]
        places += [str(Path(p, *package)) for p in sys.path if p]
        found = PathFinder.find_spec(name, places) if here else None
        if _is_regular(found) and is_compiled(found.origin):
            self.refuse(name, found.origin, f"is not of the checkout of {self.side.side}: a build has to make it")

    def refuse(self, name: str, file: str, why: str) -> None:
        """Raise ModuleNotFoundError; `bench.provenance` fails the process even if that is caught."""
        self.refused[name] = (file, why)
        raise ModuleNotFoundError(f"{name}: {file} {why}", name=name)

    def _portions(self, spec: ModuleSpec | None) -> list[str]:
        """The folders of a package, those of the working tree moved to the checkout."""
        places = [] if spec is None else [str(place) for place in spec.submodule_search_locations or ()]
        moved = [str(self.side.counterpart(p)) if self.side.place(p) == "repository" else p for p in places]
        return [new for new, old in zip(moved, places, strict=True) if new == old or Path(new).is_dir()]

    def _home(self, name: str, elsewhere: str | None = None) -> ModuleSpec | None:
        """The one tracked place of a top-level name to which nothing leads, or of which a copy lies elsewhere."""
        homes = self.side.homes(name)
        if elsewhere is None:
            homes = [home for home in homes if not ASIDE & set(home.parts)]
        elif not homes or not project.is_of(self.side, name, elsewhere, homes):
            return None
        homes = [home for home in homes if not ASIDE & set(home.parts)] or homes
        folders = {project.folder_of(home) for home in homes}
        folders = {folder for folder in folders if self.side.is_project(folder)} or folders
        if len(folders) > 1 and elsewhere is not None:
            several = ", ".join(sorted(map(str, homes)))
            self.refuse(name, elsewhere, f"is a copy, of which of {several} cannot be told")
        return PathFinder.find_spec(name, [str(Path(self.side.folder, *folders))]) if len(folders) == 1 else None

    def _namespace(self, name: str) -> list[str]:
        """The folders of this name that lie in a project's folder and are no package."""
        places = {
            place
            for place in self.side.namespaces(name)
            if self.side.is_project(place.parent) and not ASIDE & set(place.parts)
        }
        return [str(Path(self.side.folder, place)) for place in sorted(places)]


def finder() -> CheckoutFirst | None:
    """The finder of this process, if `begin` has put it there."""
    return next((one for one in sys.meta_path if isinstance(one, CheckoutFirst)), None)


def begin() -> bool:
    """From now on modules come from the checkout that this process measures; False if it measures none.

    What has been imported by now is the runner's, and stays as it is, in processes that this one starts as well.
    """
    side = project.side()
    if side is None or finder() is not None:
        return side is not None
    if LOADED not in os.environ:
        os.environ[LOADED] = ",".join(sorted({name.partition(".")[0] for name in sys.modules.keys() - EARLY}))
    left = frozenset((*sys.stdlib_module_names, *OURS, *os.environ[LOADED].split(","), "__main__", "sitecustomize"))
    # The entries of sys.path in the working tree become the checkout's, whose own come before what is installed.
    path = [str(side.counterpart(p)) if p and side.place(p) == "repository" else p for p in sys.path]
    at = next((k for k, p in enumerate(path) if "site-packages" in p or "dist-packages" in p), len(path))
    sys.path[:] = dict.fromkeys([*path[:at], *side.imports, *path[at:]])
    sys.meta_path.insert(
        sys.meta_path.index(OursFirst) + 1 if OursFirst in sys.meta_path else 0, CheckoutFirst(side, left)
    )
    return True
