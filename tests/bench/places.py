"""Repositories of another project, environments into which it is installed, and what the two sides import of it.

The processes are those that list a side's workloads, with a suite that needs no PyTorch: what they import is what those
that measure import. The fixture `place` makes them.
"""

import compileall
import shutil
import venv

from bench import checkouts
from tests.bench.foreign import commit, git

LIST = """import json, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from bench import packages
packages.install()
from bench import imports, provenance
imports.begin()
spec = spec_from_file_location("suite", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
names = module.workloads(False)
if provenance.trouble():
    print(f"error: {provenance.trouble()}", file=sys.stderr)
    sys.exit(1)
Path(sys.argv[3]).write_text(json.dumps(names))
"""
SUITE = "{imports}\n\n\ndef workloads(quick):\n    return [f'times/{{{times}}}']\n"
# What meson-python and scikit-build-core install: a finder before all others, of packages and what is in them.
FIRST = """import sys
from importlib.machinery import PathFinder
class First:
    def find_spec(name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top == {top!r}:
            return PathFinder.find_spec(name, [{folder!r} + "/" * bool(rest) + "/".join(name.split(".")[:-1])])
sys.meta_path.insert(0, First)
"""


class Place:
    """A repository, and an environment beside or inside it."""

    def __init__(self, root, environment):
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        venv.create(environment, symlinks=True)
        self.python = environment / "bin" / "python"
        self.site = next((environment / "lib").glob("python3*/site-packages"))

    def write(self, files):
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)


def package(folder, name="mine", **more):
    """A package whose number is in a module of its own."""
    return {
        f"{folder}/{name}/__init__.py": f"from {name}.core import TIMES\n",
        f"{folder}/{name}/core.py": "TIMES = 1\n",
        **more,
    }


PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\nname = "{}"\n'


def nothing(place, folder, top):
    pass


def path_file(place, folder, top):
    (place.site / "installed.pth").write_text(f"{folder}\n")


def setuptools_finder(place, folder, top):
    """As setuptools writes it."""
    from setuptools.command.editable_wheel import _finder_template

    is_module = (folder / f"{top}.py").exists()
    is_namespace = not is_module and not (folder / top / "__init__.py").exists()
    mapping = {f"{top}.mine": str(folder / top / "mine")} if is_namespace else {top: str(folder / top)}
    namespaces = {top: [str(folder / top)]} if is_namespace else {}
    (place.site / "__editable___finder.py").write_text(_finder_template("__editable__", mapping, namespaces))
    (place.site / "__editable__.pth").write_text("import __editable___finder; __editable___finder.install()\n")


def first_finder(place, folder, top):
    (place.site / "_editable_loader.py").write_text(FIRST.format(top=top, folder=str(folder)))
    (place.site / "editable.pth").write_text("import _editable_loader\n")


def copied(place, folder, top):
    """By hand, in an earlier state."""
    found = folder / top if (folder / top).is_dir() else folder / f"{top}.py"
    (shutil.copytree if found.is_dir() else shutil.copy)(found, place.site / found.name)


def installed(place, folder, top):
    """As pip leaves it."""
    copied(place, folder, top)
    info = place.site / "mine-1.0.dist-info"
    info.mkdir()
    listed = (path.relative_to(place.site) for path in place.site.glob(f"{top}*/**/*.py"))
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*listed, f"{top}.py")))
    (info / "direct_url.json").write_text(f'{{"url": "file://{folder}", "dir_info": {{}}}}')


def stale(place, folder, top):
    """A line of a path file imports the package before anything else runs."""
    copied(place, folder, top)
    (place.site / "early.pth").write_text(f"import {top}\n")


def zipped(place, folder, top):
    """As setuptools once left eggs."""
    shutil.make_archive(str(place.site / "mine-1.0.egg"), "zip", folder, top)
    (place.site / "easy-install.pth").write_text("./mine-1.0.egg.zip\n")


def sourceless(place, folder, top):
    copied(place, folder, top)
    compileall.compile_dir(place.site / top, legacy=True, quiet=1)
    for file in (place.site / top).glob("*.py"):
        file.unlink()


def from_an_index(place, folder, top):
    """By a distribution of whose name only its setup.py knows that it is the project's."""
    installed(place, folder, top)
    (place.site / "mine-1.0.dist-info" / "direct_url.json").unlink()


INSTALLS = (nothing, path_file, setuptools_finder, first_finder, copied, installed)


def two_commits(place, file, old="TIMES = 1", new="TIMES = 3"):
    git(place.root, "init", "-q")
    commit(place.root, "base")
    text = (place.root / file).read_text()
    assert old in text
    (place.root / file).write_text(text.replace(old, new))
    commit(place.root, "head")


def compared(place, suite="speed.py", build=None):
    """(what base measured and head did not, the other way round); the repository is left as it was."""
    before = git(place.root, "status", "--porcelain", "--ignored"), git(place.root, "for-each-ref")
    try:
        with checkouts.checkouts("base", "head", [str(place.root / suite)], True, "", build) as found:
            return found.gone, found.new
    finally:
        assert (git(place.root, "status", "--porcelain", "--ignored"), git(place.root, "for-each-ref")) == before
        assert git(place.root, "worktree", "list").count("\n") == 0
        assert not (place.root / ".git" / "worktrees").exists()


SEEN = ["times/1"], ["times/3"]
