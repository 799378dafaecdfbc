"""What a process that measures a checkout is told of it, and of whom a file is: the checkout's or somebody else's.

Only the standard library is imported here: this comes before everything else, in processes that the suite starts too.
"""

import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import unquote

# The variable that names the file of a process's Side.
VARIABLE = "DDPM_BENCH_CHECKOUT"
MANIFESTS = ("pyproject.toml", "setup.py", "setup.cfg")
# Files that say what is compiled, and what is compiled.
RECIPES = (*MANIFESTS, "CMakeLists.txt", "meson.build", "Cargo.toml")
NATIVE = (".c", ".cc", ".cpp", ".cxx", ".cu", ".pyx", ".rs", ".f", ".f90", ".m", ".mm", ".zig", ".go", ".nim")
# Folders whose files stand in for packages, and those with copies of others' packages: not what a name means to which
# nothing leads.
STAND_INS = frozenset(("test", "tests", "testing", "doc", "docs", "example", "examples", "stubs", "typings"))
ASIDE = STAND_INS | frozenset(("vendor", "vendored", "third_party", "external", "extern", "deps"))
# Of what two copies of a module define, the share that both do.
ALIKE = 0.25
DEFINED = re.compile(r"^(?:async def|def|class)\s+(\w+)|^(\w+)\s*(?::[^=\n]+)?=", re.M)


@dataclass(frozen=True, eq=False)
class Side:
    """A side's files. All folders are real paths.

    side: base or head. repository: the user's working tree. folder: the checkout of the commit. made: of what its build
    installed, and of caches. imports: folders that come first in the import path. files: tracked ones, relative.
    others: those of the repository that this side has not. complete_ns: the whole second, by the file system's clock,
    before which all files were there and no build had begun.
    """

    side: str
    repository: str
    folder: str
    made: str
    imports: tuple[str, ...]
    files: tuple[str, ...]
    others: tuple[str, ...]
    complete_ns: int

    def write(self, path: Path) -> None:
        """Into a file for VARIABLE."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def place(self, file: str) -> str:
        """Where it lies: "checkout", "repository" (the working tree without environments in it), or "elsewhere"."""
        return _place(self, str(file))

    def counterpart(self, file: str) -> Path:
        """The file of the working tree in the checkout."""
        return Path(self.folder, os.path.relpath(os.path.realpath(file), self.repository))

    def origin(self, file: str) -> Path:
        """The file of the checkout in the working tree."""
        return Path(self.repository, os.path.relpath(os.path.realpath(file), self.folder))

    @cached_property
    def _modules(self) -> dict[str, list[Path]]:
        """{last part of the name: files} of the tracked modules and packages."""
        found: dict[str, list[Path]] = {}
        for file in map(Path, self.files):
            if file.suffix == ".py":
                found.setdefault(file.parent.name if file.name == "__init__.py" else file.stem, []).append(file)
        return found

    def homes(self, name: str) -> list[Path]:
        """The tracked files that may be the module of a dotted name: those whose first part lies in no package."""
        parts, found = name.split("."), []
        for file in self._modules.get(parts[-1], ()):
            whole = file.parent.parts if file.name == "__init__.py" else file.with_suffix("").parts
            at = len(whole) - len(parts)
            if whole[at:] == tuple(parts) and at >= 0 and not Path(self.folder, *whole[:at], "__init__.py").exists():
                found.append(file)
        return found

    def namespaces(self, name: str) -> set[Path]:
        """The tracked folders of this name that are no package, lie in none, and have packages or modules."""
        found = set()
        for files in self._modules.values():
            for file in files:
                place = folder_of(file)
                if place.name == name and not any(
                    Path(self.folder, folder, "__init__.py").exists() for folder in (place, place.parent)
                ):
                    found.add(place)
        return found

    def folders_of(self, names: Iterable[str]) -> list[Path]:
        """The folders that come first, and those in which the checkout has modules of these names."""
        homes = [home for name in names for home in self.homes(name) if not ASIDE & set(home.parts)]
        return [*map(Path, self.imports), *(Path(self.folder, folder_of(home)) for home in homes)]

    def is_project(self, folder: Path) -> bool:
        """Whether a folder of the checkout, or the one above its src/, has a manifest."""
        places = (folder, folder.parent) if folder.name in ("src", "lib", "python") else (folder,)
        return any(Path(self.folder, place, name).is_file() for place in places for name in MANIFESTS)

    @cached_property
    def distributions(self) -> frozenset[str]:
        """The names of what the checkout's manifests make."""
        named = (_named(Path(self.folder, file)) for file in self.files if Path(file).name in MANIFESTS)
        return frozenset(_normal(name) for name in named if name)


def folder_of(home: Path) -> Path:
    """The folder that a module or package lies in, by the file of either."""
    return home.parent.parent if home.name == "__init__.py" else home.parent


@cache
def side() -> Side | None:
    """The side that this process measures; None in any other process."""
    file = os.environ.get(VARIABLE)
    if not file:
        return None
    facts = json.loads(Path(file).read_text(encoding="utf-8"))
    return Side(**{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()})


@cache
def _place(side: Side, file: str) -> str:
    path = os.path.realpath(file)
    for folder in (side.folder, side.made):
        if path == folder or path.startswith(folder + os.sep):
            return "checkout"
    if path == side.repository:
        return "repository"
    inside = path.startswith(side.repository + os.sep)
    return "repository" if inside and not is_installed(path, side.repository) else "elsewhere"


def is_installed(path: str, top: str) -> bool:
    """Whether a file below `top` is an environment's: a virtual one's, conda's, of a folder that pip installed into."""
    prefixes = {os.path.realpath(prefix) + os.sep for prefix in (sys.prefix, sys.base_prefix)}
    if any(path.startswith(prefix) for prefix in prefixes if prefix.startswith(top + os.sep)):
        return True
    # The working tree itself may be an environment's folder; its own files are no installation.
    return any(_is_environment(Path(top, folder)) for folder in Path(path).relative_to(top).parents if folder.parts)


@cache
def _is_environment(folder: Path) -> bool:
    if folder.name in ("site-packages", "dist-packages"):
        return True
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return bool(names & {"pyvenv.cfg", "conda-meta"}) or any(name.endswith(".dist-info") for name in names)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _named(manifest: Path) -> str | None:
    """The name in a pyproject.toml, setup.cfg or setup.py."""
    text = manifest.read_text(encoding="utf-8", errors="replace")
    if manifest.suffix == ".toml":
        try:
            table = tomllib.loads(text)
        except ValueError:
            return None  # whoever builds it says so
        return table.get("project", {}).get("name") or table.get("tool", {}).get("poetry", {}).get("name")
    found = re.search(r"\bname\s*=\s*[\"']?([\w.-]+)", text)
    return found and found[1]


def is_of(side: Side, name: str, file: str, homes: Sequence[Path], by_distribution: bool = False) -> bool:
    """Whether a module outside is an installed copy of the project's: by its distribution, else by what it defines.

    homes: the tracked files that it may be a copy of. by_distribution: nothing else counts.
    """
    owners = owners_of(file, name)
    if any(
        _normal(owner.name.partition("-")[0]) in side.distributions
        or side.place(_source(owner) or os.sep) == "repository"
        for owner in owners
    ):
        return True
    if by_distribution:
        return False
    of_projects = [home for home in homes if not ASIDE & set(home.parts) and side.is_project(folder_of(home))]
    if of_projects and not owners:
        return True
    # With owners it is another distribution's, or one's whose name only its setup.py can tell.
    homes = of_projects if owners else [home for home in homes if not STAND_INS & set(home.parts)]
    return any(_alike(Path(file), Path(side.folder, home)) for home in homes)


@cache
def owners_of(file: str, name: str) -> list[Path]:
    """The dist-info folders whose distributions say that they installed this file, the module of this name."""
    up = name.count(".") + (1 if Path(file).stem == "__init__" else 0)
    if len(Path(file).parents) <= up:
        return []
    site = Path(file).parents[up]
    listed = Path(file).relative_to(site).as_posix()
    records = [(folder, folder / "RECORD") for folder in site.glob("*.dist-info")]
    return [
        folder
        for folder, record in records
        if record.is_file() and f"\n{listed}," in "\n" + record.read_text(encoding="utf-8", errors="replace")
    ]


def _source(dist_info: Path) -> str | None:
    """The folder that a distribution was installed from, if it was one."""
    file = dist_info / "direct_url.json"
    url = json.loads(file.read_text(encoding="utf-8")).get("url", "") if file.is_file() else ""
    return unquote(url.removeprefix("file://")) if url.startswith("file://") else None


def _alike(one: Path, other: Path) -> bool:
    """Whether two modules or packages define much the same, as far as can be told."""
    if one.suffix != ".py" or not one.is_file():
        return True  # compiled, or in an archive: nobody can tell
    if one.name != other.name:
        return False
    if one.read_bytes() == other.read_bytes():
        return True
    first, second = set(_defined(one)), set(_defined(other))
    return len(first & second) > ALIKE * len(first | second)


def _defined(file: Path) -> Iterator[str]:
    """The files of a package and the names that it defines itself."""
    if file.name == "__init__.py":
        yield from (path.name for path in file.parent.iterdir() if path != file and path.name != "__pycache__")
    text = file.read_text(encoding="utf-8", errors="replace")
    yield from (first or second for first, second in DEFINED.findall(text))
