"""Whose code each side imports: layouts of a repository against ways in which its package is installed.

HEAD has a 3 where base has a 1, and the one workload of the suite is named by it.
"""

import shutil

import pytest

from ddpm.errors import WorkFailed
from tests.bench.foreign import git
from tests.bench.places import (
    INSTALLS,
    PROJECT,
    SEEN,
    SUITE,
    compared,
    copied,
    from_an_index,
    nothing,
    package,
    path_file,
    sourceless,
    stale,
    two_commits,
    zipped,
)

# {layout: (files, the file with the number, the folder that an installation leads to, the suite, what it imports)}
LAYOUTS = {
    "top": ({"mine.py": "TIMES = 1\n"}, "mine.py", ".", "speed.py", "mine"),
    "src": (package("src"), "src/mine/core.py", "src", "speed.py", "mine"),
    "monorepo": (package("python"), "python/mine/core.py", "python", "speed.py", "mine"),
    "two projects": (
        package("a", "other", **{"a/pyproject.toml": PROJECT.format("other")})
        | package("b/src", **{"b/pyproject.toml": PROJECT.format("mine")})
        | {"a/tests/mine/__init__.py": "TIMES = 7\n"},
        "b/src/mine/core.py",
        "b/src",
        "b/benchmarks/speed.py",
        "mine",
    ),
    "project of the package's name": (
        package("mine", **{"mine/pyproject.toml": PROJECT.format("mine")}),
        "mine/mine/core.py",
        "mine",
        "speed.py",
        "mine",
    ),
    "namespace": (
        {"python/space/mine/__init__.py": "TIMES = 1\n", "python/pyproject.toml": PROJECT.format("space-mine")},
        "python/space/mine/__init__.py",
        "python",
        "bench/speed.py",
        "space.mine",
    ),
}


# Each layout and each install is among the twelve pairs that are not long.
@pytest.mark.parametrize(
    ("layout", "install"),
    [
        pytest.param(
            layout, install, marks=() if (i + k) % 3 == 0 else pytest.mark.long, id=f"{layout}-{install.__name__}"
        )
        for i, layout in enumerate(LAYOUTS)
        for k, install in enumerate(INSTALLS)
    ],
)
def test_each_side_imports_its_own(place, layout, install):
    files, number, folder, suite, module = LAYOUTS[layout]
    place = place()
    place.write(files | {suite: SUITE.format(imports=f"import {module}", times=f"{module}.TIMES")})
    two_commits(place, number)
    git(place.root, "checkout", "-q", "base")  # what is copied is base's
    install(place, place.root / folder, module.partition(".")[0])
    git(place.root, "checkout", "-q", "head")
    assert compared(place, suite) == SEEN


@pytest.mark.parametrize("install", [nothing, path_file, copied], ids=lambda install: install.__name__)
def test_two_projects_that_share_a_namespace(place, install):
    place = place()
    for name in ("mine", "other"):
        place.write(package(f"{name}/src/space", name))
        for file in ("__init__", "core"):
            path = place.root / name / "src" / "space" / name / f"{file}.py"
            path.write_text(path.read_text().replace(f"from {name}", f"from space.{name}"))
        place.write({f"{name}/pyproject.toml": PROJECT.format(f"space-{name}")})
    place.write({"speed.py": SUITE.format(imports="import space.mine, space.other", times="space.mine.TIMES")})
    two_commits(place, "mine/src/space/mine/core.py")
    git(place.root, "checkout", "-q", "base")
    if install is path_file:
        (place.site / "both.pth").write_text("".join(f"{place.root}/{name}/src\n" for name in ("mine", "other")))
    for name in ("mine", "other") if install is copied else ():
        shutil.copytree(place.root / name / "src" / "space", place.site / "space", dirs_exist_ok=True)
    assert compared(place) == SEEN


def test_what_was_imported_before_anything_else_is_named(place):
    place = place()
    place.write(package("python") | {"speed.py": SUITE.format(imports="import mine", times="mine.TIMES")})
    two_commits(place, "python/mine/core.py")
    stale(place, place.root / "python", "mine")
    with pytest.raises(
        WorkFailed, match=r"head: module mine\S*: \S+site-packages/mine/\S+\.py is a copy of python/mine/"
    ):
        compared(place)


@pytest.mark.parametrize("install", [zipped, sourceless, from_an_index], ids=lambda install: install.__name__)
def test_a_copy_that_says_little_of_itself_is_one(place, install):
    place = place()
    setup = "from setuptools import setup\n\nNAME = 'mine'\nsetup(name=NAME, packages=[NAME])\n"
    suite = SUITE.format(imports="import mine", times="mine.TIMES")
    place.write(
        package("python") | {"speed.py": suite} | ({"python/setup.py": setup} if install is from_an_index else {})
    )
    two_commits(place, "python/mine/core.py")
    install(place, place.root / "python", "mine")
    assert compared(place) == SEEN


def test_what_nobody_installed_is_a_copy_of_what_a_project_of_that_name_has(place):
    """However little of it is the same: an old release, say."""
    place = place()
    suite = SUITE.format(imports="import mine", times="mine.TIMES")
    place.write(package("python", **{"python/pyproject.toml": PROJECT.format("mine"), "speed.py": suite}))
    two_commits(place, "python/mine/core.py")
    (place.site / "mine.py").write_text("TIMES = 7\nold = 1\nolder = 2\n")
    assert compared(place) == SEEN


def test_a_copy_of_one_of_two_is_refused_by_name(place):
    place = place()
    place.write(package("one") | package("two") | {"speed.py": SUITE.format(imports="import mine", times="mine.TIMES")})
    two_commits(place, "one/mine/core.py")
    copied(place, place.root / "one", "mine")
    with pytest.raises(
        WorkFailed, match=r"head: .*mine: \S+site-packages/mine/__init__.py is a copy, of which of one/m"
    ):
        compared(place)


def test_an_environment_inside_the_working_tree_is_none_of_it(place, tmp_path):
    place = place(tmp_path / "theirs" / ".venv")
    place.write(
        package("python")
        | {".gitignore": ".venv\n"}
        | {"speed.py": SUITE.format(imports="import mine, other", times="mine.TIMES")}
    )
    (place.site / "other.py").write_text("")
    path_file(place, place.root / "python", "mine")
    two_commits(place, "python/mine/core.py")
    assert compared(place) == SEEN


CHILD = """import subprocess, sys
done = subprocess.run([sys.executable, "-c", "import mine; print(mine.TIMES)"], capture_output=True, text=True)
"""


@pytest.mark.parametrize("install", [*INSTALLS, stale], ids=lambda install: install.__name__)
def test_processes_that_the_suite_starts_import_the_same(place, install):
    place = place()
    place.write(package("python") | {"speed.py": SUITE.format(imports=CHILD, times="done.stdout.strip()")})
    two_commits(place, "python/mine/core.py")
    git(place.root, "checkout", "-q", "base")
    install(place, place.root / "python", "mine")
    if install is stale:
        with pytest.raises(WorkFailed, match=r"module mine\S*: \S+site-packages/mine/"):
            compared(place)
    else:
        assert compared(place) == SEEN


HARMLESS = {
    "tests/colours/__init__.py": "def red():\n    return 1\n",  # stands in for what is installed
    "docs/colours.py": "",
    "third_party/shapes/__init__.py": "def square():\n    return 1\n",  # a vendored copy
    "src/mine/_vendor/__init__.py": "",
    "src/mine/_vendor/shapes/__init__.py": "def square():\n    return 1\n",
    "queue.py": "raise SystemExit('imported instead of the standard library')\n",
    "tests/json/__init__.py": "raise SystemExit('imported instead of the standard library')\n",
}


def test_what_has_the_name_of_something_installed_is_no_alarm(place):
    place = place()
    imports = "import colours, json, queue, shapes, mine\nfrom mine._vendor import shapes\ncolours.red, colours.blue"
    place.write(package("src") | HARMLESS | {"benchmarks/speed.py": SUITE.format(imports=imports, times="mine.TIMES")})
    (place.site / "shapes").mkdir()
    (place.site / "shapes" / "__init__.py").write_text(HARMLESS["third_party/shapes/__init__.py"])
    (place.site / "shapes-1.dist-info").mkdir()
    (place.site / "shapes-1.dist-info" / "RECORD").write_text("shapes/__init__.py,,\n")
    (place.site / "sitecustomize.py").write_text("import sys\nsys.customized = True\n")
    two_commits(place, "src/mine/core.py")
    (place.site / "colours").mkdir()
    (place.site / "colours" / "__init__.py").write_text("red = 1\nblue = 2\ngreen = 3\nblack = 4\nwhite = 5\n")
    assert compared(place, "benchmarks/speed.py") == SEEN
