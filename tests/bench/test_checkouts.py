"""What a side is made of: the commit's files, its submodules, what its build makes, and the suites that both run."""

import os
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import build, checkouts, worktrees
from bench.packages import ROOT
from bench.registry import selected
from ddpm.errors import BadInput, WorkFailed
from tests.bench.foreign import commit, git
from tests.bench.places import (
    INSTALLS,
    PROJECT,
    SEEN,
    SUITE,
    Place,
    compared,
    copied,
    first_finder,
    installed,
    nothing,
    package,
    path_file,
    setuptools_finder,
    two_commits,
)


@pytest.fixture
def at_once(monkeypatch):
    """No side with sources of extensions waits for the next second: by it only what a build leaves is told apart."""
    monkeypatch.setattr(checkouts, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


@pytest.fixture
def with_submodule(place, tmp_path):
    """A package in a submodule, whose second commit was never pushed; the file says 1, then 3."""
    place = place()
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    (upstream / "mine").mkdir()
    (upstream / "mine" / "__init__.py").write_text("TIMES = 1\n")
    git(upstream, "init", "-q")
    commit(upstream, "one")
    git(place.root, "init", "-q")
    git(place.root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(upstream), "libs/core")
    place.write({"speed.py": SUITE.format(imports="import mine", times="mine.TIMES")})
    commit(place.root, "base")
    (place.root / "libs" / "core" / "mine" / "__init__.py").write_text("TIMES = 3\n")
    git(place.root / "libs" / "core", "commit", "-qam", "never pushed")
    commit(place.root, "head")
    shutil.rmtree(upstream)
    return place


@pytest.mark.parametrize("install", INSTALLS[:4], ids=lambda install: install.__name__)
def test_a_submodule_is_that_of_each_commit(with_submodule, install):
    install(with_submodule, with_submodule.root / "libs" / "core", "mine")
    assert compared(with_submodule) == SEEN
    store = with_submodule.root / ".git" / "modules" / "libs" / "core"
    assert not (store / "worktrees").exists()


def test_a_submodule_that_keeps_its_store_in_its_own_folder(with_submodule):
    """As git made them before 1.7.8, and as a clone that was added by hand is."""
    core = with_submodule.root / "libs" / "core"
    store = with_submodule.root / ".git" / "modules" / "libs" / "core"
    git(core, "config", "--unset", "core.worktree")
    (core / ".git").unlink()
    store.rename(core / ".git")
    assert compared(with_submodule) == SEEN
    assert not (core / ".git" / "worktrees").exists()


@pytest.mark.parametrize("folder", ["python", "python/mine"])
def test_what_runs_in_a_folder_of_the_repository_runs_in_that_of_the_commit(place, monkeypatch, folder):
    place = place()
    suite = SUITE.format(imports="from pathlib import Path\n\nTIMES = Path('number').read_text()", times="TIMES")
    place.write({f"{folder}/number": "1", "speed.py": suite})
    two_commits(place, f"{folder}/number", "1", "3")
    monkeypatch.chdir(place.root / folder)
    assert compared(place) == SEEN


def test_what_is_stopped_while_git_checks_out_leaves_nothing(place, monkeypatch):
    place = place()
    place.write(package(".", **{"speed.py": SUITE.format(imports="import mine", times="mine.TIMES")}))
    two_commits(place, "mine/core.py")
    plain = worktrees._git

    def stopped(*arguments, **where):
        done = plain(*arguments, **where)
        if "add" in arguments and arguments[-2].endswith("head"):
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(worktrees, "_git", stopped)
    with pytest.raises(KeyboardInterrupt):
        compared(place)


def test_a_submodule_that_is_not_here_may_not_have_changed(with_submodule, capsys):
    root = with_submodule.root
    git(root, "submodule", "deinit", "-f", "libs/core")
    shutil.rmtree(root / ".git" / "modules")
    with pytest.raises(
        WorkFailed, match=r"submodule libs/core: is \w{40} in base and \w{40} in head, and is not fetched"
    ):
        compared(with_submodule)
    git(root, "branch", "-f", "base", "head")
    with pytest.raises(WorkFailed, match="No module named 'mine'"):
        compared(with_submodule)
    assert "submodule libs/core is not fetched here" in capsys.readouterr().err


def test_a_submodule_without_the_commit_is_refused_in_gits_words(with_submodule):
    root = with_submodule.root
    git(root, "update-index", "--cacheinfo", f"160000,{'1' * 40},libs/core")
    git(root, "commit", "-qm", "nowhere")
    git(root, "branch", "-f", "head")
    with pytest.raises(BadInput, match=r"submodule libs/core: fatal: "):
        compared(with_submodule)


EXTENSION = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fast", NULL, -1, NULL};
PyMODINIT_FUNC PyInit__fast(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "TIMES", 1);
    return made;
}
"""
COMPILED = {
    "python/pyproject.toml": PROJECT.format("mine") + 'version = "1"\n[tool.setuptools]\npackages = ["mine"]\n',
    "python/setup.py": "from setuptools import Extension, setup\n"
    'setup(ext_modules=[Extension("mine._fast", ["fast.c"])])\n',
    "python/fast.c": EXTENSION,
    "python/mine/__init__.py": "try:\n    from mine._fast import TIMES\nexcept ImportError:\n    TIMES = 1\n",
    "speed.py": SUITE.format(imports="import mine", times="mine.TIMES"),
    ".gitignore": "*.so\nbuild/\n*.egg-info\n__pycache__/\n",
}
INPLACE = f"cd python && {sys.executable} setup.py -q build_ext --inplace"
# As setuptools does up to 81.
CUT = "import os, pathlib; [os.utime(f, (int(f.stat().st_mtime),) * 2) for f in pathlib.Path('mine').glob('_fast*')]"


@pytest.fixture
def compiled(place):
    place = place()
    place.write(COMPILED)
    two_commits(place, "python/fast.c", '"TIMES", 1', '"TIMES", 3')
    git(place.root, "checkout", "-q", "base")
    return place


@pytest.mark.parametrize(
    "build",
    [None, f'{INPLACE} && {sys.executable} -c "{CUT}"'],
    ids=["as its project says", "in place, times in whole seconds"],
)
@pytest.mark.parametrize(
    "install",
    [nothing, *(pytest.param(each, marks=pytest.mark.long) for each in (path_file, setuptools_finder, copied))],
    ids=lambda install: install.__name__,
)
def test_an_extension_is_built_for_each_side(compiled, install, build):
    if install is not nothing:
        subprocess.run(INPLACE, shell=True, check=True, cwd=compiled.root)  # noqa: S602
    install(compiled, compiled.root / "python", "mine")
    assert compared(compiled, build=build) == SEEN


@pytest.mark.parametrize(
    "install", [path_file, setuptools_finder, first_finder, copied], ids=lambda install: install.__name__
)
def test_an_extension_that_is_not_built_is_named(compiled, install, at_once):
    """Even where the package does without it."""
    subprocess.run(INPLACE, shell=True, check=True, cwd=compiled.root)  # noqa: S602
    install(compiled, compiled.root / "python", "mine")
    with pytest.raises(
        WorkFailed, match=r"head: module mine\._fast: \S+/mine/_fast\.\S+\.so .* a build has to make it"
    ):
        compared(compiled, build="")


def test_an_extension_without_a_package_is_of_a_build_too(place, at_once):
    """Copied by hand: nothing says whose it is but its name."""
    place = place()
    place.write({"fast.c": EXTENSION.replace("_fast", "fast"), ".gitignore": "*.so\nbuild/\n"})
    place.write({"speed.py": SUITE.format(imports="import fast", times="fast.TIMES")})
    two_commits(place, "fast.c", '"TIMES", 1', '"TIMES", 3')
    build = 'cc -shared -fPIC $(python -c "{}") -o {}/fast.abi3.so fast.c'
    build = build.format("import sysconfig; print('-I' + sysconfig.get_path('include'))", "{}")
    subprocess.run(build.format(place.site), shell=True, check=True, cwd=place.root)  # noqa: S602
    with pytest.raises(WorkFailed, match=r"head: module fast: \S+site-packages/fast\.abi3\.so is an installed copy"):
        compared(place)
    assert compared(place, build=build.format(".")) == SEEN


def test_plugins_are_those_that_each_commit_declares(place):
    """What an installation says of them is of one commit alone."""
    place = place()
    declared = PROJECT.format("mine") + 'version = "1"\n[project.entry-points."mine.plugins"]\na = "mine.core:{}"\n'
    imports = "from importlib.metadata import entry_points\n\n(one,) = entry_points(group='mine.plugins')"
    place.write(
        {
            "python/mine/__init__.py": "",
            "python/mine/core.py": "ONE = 1\nTHREE = 3\n",
            "python/pyproject.toml": declared.format("ONE"),
            "speed.py": SUITE.format(imports=imports, times="one.load()"),
        }
    )
    two_commits(place, "python/pyproject.toml", "core:ONE", "core:THREE")
    installed(place, place.root / "python", "mine")
    info = place.site / "mine-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mine.plugins]\na = mine.core:THREE\n")
    assert compared(place) == SEEN


@pytest.mark.long
def test_a_namespace_of_projects_that_are_built_and_one_that_is_not(place):
    place = place()
    for name in ("built", "mine", "plain"):
        plugins = "" if name == "plain" else '[project.entry-points."mine.plugins"]\na = "space.mine:TIMES"\n'
        place.write(
            {
                f"{name}/space/{name}/__init__.py": "TIMES = 1\n",
                f"{name}/pyproject.toml": f'{PROJECT.format(f"space-{name}")}version = "1"\n{plugins}'
                f'[tool.setuptools]\npackages = ["space.{name}"]\n',
            }
        )
    modules = "space.built, space.mine, space.plain"
    place.write({"speed.py": SUITE.format(imports=f"import {modules}", times="space.mine.TIMES")})
    two_commits(place, "mine/space/mine/__init__.py")
    assert compared(place) == SEEN


def test_a_compiled_file_in_the_commit_is_not_what_its_sources_make(compiled):
    subprocess.run(INPLACE, shell=True, check=True, cwd=compiled.root)  # noqa: S602
    git(compiled.root, "checkout", "-q", "--detach", "head")
    git(compiled.root, "add", "-f", *map(str, (compiled.root / "python" / "mine").glob("*.so")))
    git(compiled.root, "commit", "-qm", "with the library")
    git(compiled.root, "branch", "-f", "base")
    git(compiled.root, "branch", "-f", "head")
    with pytest.raises(WorkFailed, match=r"head: module mine\._fast: \S+\.so was not built from the sources of head"):
        compared(compiled, build="")


def test_a_build_that_fails_is_named_with_its_side_and_last_line(compiled, at_once):
    with pytest.raises(WorkFailed, match=r"base: the build failed: echo no; exit 7: exit code 7: no"):
        compared(compiled, build="echo no; exit 7")
    with pytest.raises(WorkFailed, match=r"head: the build failed: grep .*: exit code 1: it said nothing"):
        compared(compiled, build="grep '\"TIMES\", 1' python/fast.c")


def test_a_build_that_asks_gets_nothing_and_one_that_hangs_is_ended(tmp_path, monkeypatch):
    with pytest.raises(WorkFailed, match="base: the build failed: read answer: exit code 1: it said nothing"):
        build.build("base", tmp_path, [], tmp_path / "made", "read answer", {})
    monkeypatch.setattr(build, "TIMEOUT", 0.5)
    command = "echo begun; sleep 60 & echo $! > child; wait"
    with pytest.raises(WorkFailed, match=r"head: the build failed: .* no end after 0\.5 s: begun"):
        build.build("head", tmp_path, [], tmp_path / "made", command, {})
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")

    def has_ended():
        return not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"

    until = time.monotonic() + 30  # it was sent a signal, and a busy machine takes its time
    while not has_ended() and time.monotonic() < until:
        time.sleep(0.01)
    assert has_ended()


def test_a_library_of_the_working_tree_is_named(place, at_once):
    place = place()
    suite = f'import ctypes\nctypes.CDLL("{place.root}/libfast.so")\n'
    place.write({"fast.c": "int fast;\n", ".gitignore": "*.so\n", "speed.py": SUITE.format(imports=suite, times="1")})
    two_commits(place, "fast.c", "int", "long")
    subprocess.run(["cc", "-shared", "-o", "libfast.so", "fast.c"], check=True, cwd=place.root)
    with pytest.raises(WorkFailed, match=rf"head: library {place.root}/libfast.so is loaded from the working tree"):
        compared(place)


@pytest.mark.parametrize("suite", ["bench/speed.py", "untracked", "outside"])
def test_a_suite_and_its_helpers(place, tmp_path, suite, at_once):
    """Tracked: helpers from each side. Untracked, or outside: the same for both."""
    place = place()
    place.write(package("python", **{"bench/__init__.py": "", "kernels/fast.cu": "", "export/a.py": ""}))
    helper = {"bench/helper.py": "NAME = 'times'\n"}
    text = "import helper, mine\n\n\ndef workloads(quick):\n    return [f'{helper.NAME}/{mine.TIMES}']\n"
    if suite == "bench/speed.py":
        place.write(helper | {suite: text})
    two_commits(place, "python/mine/core.py")
    where = {"untracked": place.root / "bench", "outside": tmp_path / "elsewhere"}.get(suite)
    if where is not None:
        where.mkdir(exist_ok=True)
        (where / "helper.py").write_text(helper["bench/helper.py"])
        (where / "speed.py").write_text(text)
    assert compared(place, suite if where is None else where / "speed.py") == SEEN


def test_files_that_a_commit_does_not_have_as_they_are(place):
    """Left out of archives, generated and ignored, made from a tag."""
    place = place()
    files = {
        ".gitattributes": "python/mine/core.py export-ignore\n",
        ".gitignore": "_version.py\n",
        "speed.py": SUITE.format(imports="import mine\nfrom mine._version import VERSION", times="mine.TIMES"),
    }
    place.write(package("python", **files))
    (place.root / "python" / "mine" / "_version.py").write_text("VERSION = 'of the working tree'\n")
    two_commits(place, "python/mine/core.py")
    git(place.root, "tag", "v1.0", "base")
    build = "printf 'VERSION = \"%s\"\\n' $(git describe --tags) > python/mine/_version.py"
    assert compared(place, build=build) == SEEN
    with pytest.raises(WorkFailed, match=r"No module named 'mine\._version'"):
        compared(place)
    git(place.root, "tag", "-d", "v1.0")
    with pytest.raises(WorkFailed, match=r"base: the build failed: .*No names found"):
        compared(place, build=f"set -e; git describe --tags; {build}")


def test_a_benchmark_that_is_gone_new_or_renamed(place):
    place = place()
    place.write({"mine.py": "TIMES = 1\n", "speed.py": "def workloads(quick):\n    return ['a', 'b', 'c']\n"})
    two_commits(place, "speed.py", "['a', 'b', 'c']", "['a', 'renamed', 'c', 'new']")
    assert compared(place) == (["b"], ["renamed", "new"])


ROWS = """\
import torch

import mine
from bench import Bench, Candidate, Cost, Workload


def build(device):
    candidates = {{name: Candidate(lambda: mine.{0}, lambda call: 0.0, 1.0) for name in {1}}}
    return Bench([(torch.ones(3),)], lambda x: x, candidates, Cost(24, 3), frozen=True)


def workloads(quick):
    return [Workload("a", "speed", build)]
"""


@pytest.mark.long
def test_rows_that_base_measures_and_that_heads_suite_has_not_or_that_do_not_run(tmp_path, monkeypatch, capsys):
    """A candidate that is gone; a function with another name, which shows when it is called and not when imported."""
    root, suite = tmp_path, str(tmp_path / "speed.py")
    monkeypatch.chdir(root)
    monkeypatch.setattr(checkouts.machine, "repository", lambda: root)
    commits = {
        "base": ("old = abs\n", ROWS.format("old", ["one", "two"])),
        "fewer": ("old = abs\n", ROWS.format("old", ["one"])),
        "renamed": ("new = abs\n", ROWS.format("new", ["one", "two", "three"])),
    }
    git(root, "init", "-q")
    for name, (code, text) in commits.items():
        (root / "mine.py").write_text(code)
        (root / "speed.py").write_text(text)
        commit(root, name)
    with checkouts.checkouts("base", "fewer", [suite], True, "") as found:
        assert (found.gone, found.new) == (["a two"], [])
    assert capsys.readouterr().err == ""
    with checkouts.checkouts("base", "renamed", [suite], True, "") as found:
        assert (found.gone, found.new) == ([], [])
        assert "mine.old" in (found.sides["base"].root / "speed.py").read_text()
    said = capsys.readouterr().err
    assert "base runs its own benchmarks, head's need what it lacks (base: a one: AttributeError" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def workloads(quick):\n    return []\n", r"workloads\(True\) returned none"),
        pytest.param("", "has no workloads", marks=pytest.mark.long),
    ],
)
def test_a_suite_that_has_nothing_left_is_no_bad_input(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkouts.machine, "repository", lambda: tmp_path)
    (tmp_path / "mine.py").write_text("old = abs\n")
    (tmp_path / "speed.py").write_text(ROWS.format("old", ["one"]))
    git(tmp_path, "init", "-q")
    commit(tmp_path, "base")
    (tmp_path / "speed.py").write_text(text)
    commit(tmp_path, "head")
    with (
        pytest.raises(WorkFailed, match=rf"head: --suite: \S*speed\.py: {words}"),
        checkouts.checkouts("base", "head", [str(tmp_path / "speed.py")], True, ""),
    ):
        pass


@pytest.mark.parametrize("moved", [False, True], ids=["removed", "moved"])
def test_what_the_suites_of_bases_configuration_had_is_gone(place, moved):
    place = place()
    named = '[tool.ddpm-bench]\nsuites = ["one.py", "old/two.py"]\n'
    two = "import beside\n\n\ndef workloads(quick):\n    return ['b', 'c']\n"
    place.write({"pyproject.toml": named, "one.py": "def workloads(quick):\n    return ['a']\n"})
    place.write({"old/two.py": two, "old/beside.py": ""})
    git(place.root, "init", "-q")
    commit(place.root, "base")
    git(place.root, "mv", "old/two.py", "three.py")
    place.write(
        {
            "pyproject.toml": named.replace("old/two", "three") if moved else named.replace(', "old/two.py"', ""),
            "three.py": two.replace("import beside", "").replace(", 'c'", ""),
        }
    )
    commit(place.root, "head")
    suites = [str(place.root / name) for name in (["one.py", "three.py"] if moved else ["one.py"])]
    with checkouts.checkouts("base", "head", suites, True, "", configured=True) as found:
        assert (found.gone, found.new) == (["c"] if moved else ["b", "c"], [])
        assert found.sides["base"].suites == tuple(str(found.sides["base"].root / Path(name).name) for name in suites)
    with checkouts.checkouts("base", "head", suites, True, "") as found:
        assert found.gone == []


def test_base_runs_its_own_where_heads_needs_what_it_lacks(place, capsys):
    place = place()
    place.write({"mine.py": "a = 1\n", "speed.py": "import mine\n\n\ndef workloads(quick):\n    return ['a']\n"})
    git(place.root, "init", "-q")
    commit(place.root, "base")
    place.write(
        {"mine.py": "a = b = 1\n", "speed.py": "from mine import b\n\n\ndef workloads(quick):\n    return ['a', 'b']\n"}
    )
    commit(place.root, "head")
    with checkouts.checkouts("base", "head", [str(place.root / "speed.py")], True, "") as found:
        assert (found.gone, found.new) == ([], ["b"])
        assert "import mine" in (found.sides["base"].root / "speed.py").read_text()
    assert "base runs its own benchmarks, head's need what it lacks" in capsys.readouterr().err
    git(place.root, "checkout", "-q", "--detach", "base")
    (place.root / "speed.py").write_text("import nothing\n")
    git(place.root, "commit", "-qam", "broken")
    git(place.root, "branch", "-f", "base", "HEAD")
    with pytest.raises(WorkFailed, match=r"base: .*No module named 'nothing'.* \(base's own speed\.py\)"):
        compared(place)
    git(place.root, "rm", "-q", "speed.py")
    git(place.root, "commit", "-qm", "none")
    with (
        pytest.raises(WorkFailed, match=r"speed\.py: base has this suite, head has not"),
        checkouts.checkouts("base", git(place.root, "rev-parse", "HEAD"), [str(place.root / "speed.py")], True, ""),
    ):
        pass


@pytest.mark.parametrize(
    ("suite", "base"),
    [
        ("import mine\nmine.b\n\n\ndef workloads(quick):\n    return ['b']\n", ["speed.py"]),
        ("import mine\nmine.a\n\n\ndef workloads(quick):\n    return ['b']\n", ["speed.py", "more.py"]),
        ("import mine\nmine.b\n\n\ndef workloads(quick):\n    return ['a', 'b']\n", None),  # base knows a
    ],
    ids=["new", "both run", "moved"],
)
def test_a_suite_that_head_adds_is_new_where_base_cannot_run_it(place, capsys, suite, base):
    place = place()
    place.write({"mine.py": "a = 1\n", "speed.py": "def workloads(quick):\n    return ['a']\n"})
    git(place.root, "init", "-q")
    commit(place.root, "base")
    place.write({"mine.py": "a = b = 1\n", "more.py": suite})
    commit(place.root, "head")
    suites = [str(place.root / name) for name in ("speed.py", "more.py")]
    if base is None:
        with (
            pytest.raises(WorkFailed, match=r"base: .*no attribute 'b'.* \(base has no benchmarks of its own"),
            checkouts.checkouts("base", "head", suites, True, ""),
        ):
            pass
        return
    with checkouts.checkouts("base", "head", suites, True, "") as made:
        assert (made.gone, made.new) == ([], ["b"] if base == ["speed.py"] else [])
        names = {side: [Path(name).name for name in made.sides[side].suites] for side in made.sides}
        assert names == {"base": base, "head": ["speed.py", "more.py"]}
    if made.new:
        assert "note: more.py is new, base cannot run it (base: " in capsys.readouterr().err
        with pytest.raises(WorkFailed, match="base has no benchmarks of its own"):  # there is nothing to compare with
            compared(place, "more.py")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("begun\nmine.c:3:1: error: no ';'\nerror: command 'gcc' failed with exit code 1", "mine.c:3:1: error: no ';'"),
        ("gcc -Werror=format-security mine.c\nmake: *** [all] Killed\n\n", "make: *** [all] Killed"),
        (
            "  error: subprocess-exited-with-error\n  error: invalid command 'bdist_wheel'\n"
            "error: metadata-generation-failed\nhint: See above for details.",
            "error: invalid command 'bdist_wheel'",
        ),
        ("", "it said nothing"),
    ],
)
def test_a_failed_build_tells_its_first_error(output, line):
    assert build.told(output) == line


def told(place, *arguments, environment=None):
    """(exit code, last line of stderr) of the command."""
    line = [sys.executable, "-m", "bench", "compare", *arguments, "--suite", "speed.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.long
def test_where_git_refuses_its_own_line_is_told(place, tmp_path):
    root = place().root
    (root / "mine.py").write_text("")
    two_commits(Place(root, tmp_path / "other"), "mine.py", "", "a = 1")
    assert told(root, "base", "nowhere") == (
        2,
        "error: nowhere: neither a file nor a commit of this repository (fatal: Needed a single revision)",
    )
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{root}", str(shallow))
    code, line = told(shallow, "base", "HEAD")
    assert code == 2
    assert "this clone is shallow: fetch the whole history (git fetch --unshallow, or fetch-depth: 0" in line
    outside = tmp_path / "outside"
    outside.mkdir()
    code, line = told(outside, "base", "head")
    assert code == 2
    assert line.startswith(f"error: base: not a file, and git says of {outside}: fatal: not a git repository")
    # As git has it where the folder is another user's.
    environment = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    code, line = told(root, "base", "head", environment=environment)
    assert code == 2
    assert f"git says of {root}: fatal: detected dubious ownership in repository at '{root}'" in line


def test_a_change_of_a_tracked_file_that_no_commit_has_is_refused(place):
    place = place()
    place.write({"mine.py": "TIMES = 1\n", "my notes/a b.txt": "1"})
    two_commits(place, "mine.py")
    place.write({"untracked.py": ""})
    worktrees.refuse_dirty()
    place.write({"my notes/a b.txt": "2"})
    with pytest.raises(BadInput, match=r'^"my notes/a b\.txt": is changed in no ref \(1 such file'):
        worktrees.refuse_dirty()


def test_two_suites_with_one_name_are_two_and_two_rows_with_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from bench import Workload\n\n\ndef workloads(quick):\n    return [Workload('{}', 'speed', None)]\n"
    for folder, row in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "speed.py").write_text(text.format(row))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    suites = {folder: str(tmp_path / folder / "speed.py") for folder in "abc"}
    assert [one.name for one in selected([suites["a"], suites["b"]], True, "")[0]] == ["one", "two"]
    with pytest.raises(BadInput, match=r"a/speed\.py and c/speed\.py: two workloads are called one, needs"):
        selected(list(suites.values()), True, "")


def test_the_variables_of_a_hook_lead_nowhere_else(place, monkeypatch, tmp_path):
    place = place()
    place.write({"mine.py": "TIMES = 1\n", "speed.py": SUITE.format(imports="import mine", times="mine.TIMES")})
    two_commits(place, "mine.py")
    (place.root / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\nexit 1\n")
    (place.root / ".git" / "hooks" / "post-checkout").chmod(0o755)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    with checkouts.checkouts("base", "head", [str(place.root / "speed.py")], True, "") as found:
        assert (found.gone, found.new) == SEEN


FULL = """
import torch
from bench import Bench, Candidate, Cost, Workload
import mine

def build(device):
    x = torch.randn(300, 300, device=device)
    call = Candidate(lambda: mine.softmax, lambda call: float((call(x) - x.softmax(1)).abs().max()), 1e-5)
    return Bench([(x,)], lambda x: x.softmax(1), {"mine": call}, Cost(bytes=7e5, flops=5e5), frozen=True)

def workloads(quick):
    return [Workload("softmax/300", "speed", build)]
"""
MINE = "TIMES = 1\n\n\ndef softmax(x):\n    for _ in range(TIMES):\n        y = x.softmax(1)\n    return y\n"


@pytest.mark.long
@pytest.mark.alone
def test_three_times_slower_is_found_by_the_command(tmp_path):
    """In a monorepo with a bench/ of its own, from an environment that has this runner and the package.

    By one of the installs of test_layouts.py, which has them all as far as the import.
    """
    place = Place(tmp_path / "theirs", tmp_path / "venv")
    for folder in (*site.getsitepackages(), ROOT):
        with (place.site / "runner.pth").open("a") as file:
            file.write(f"{folder}\n")
    place.write({"python/mine.py": MINE, "bench/__init__.py": "", "bench/speed.py": FULL})
    two_commits(place, "python/mine.py")
    git(place.root, "checkout", "-q", "base")
    setuptools_finder(place, place.root / "python", "mine")
    git(place.root, "checkout", "-q", "head")
    line = [place.python, "-P", "-m", "bench", "compare", "base", "head", "--suite", "bench/speed.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*line, "--processes", "6"], cwd=place.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "slower" in done.stdout
    assert git(place.root, "status", "--porcelain") == ""
    assert git(place.root, "worktree", "list").count("\n") == 0
