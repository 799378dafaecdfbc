"""Another project's repository: our packages run, its own are measured, and a name that both have is never confused."""

import builtins
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench import checkouts, machine, packages
from bench.children import environment, run_child
from bench.cli import main
from bench.packages import OURS, is_ours, refuse_clashes
from ddpm.errors import BadInput
from tests.bench.foreign import commit, git

SUITE = """
import torch
from bench.registry import Bench, Candidate, Workload
from kernels.backend import Cost

import mine
{more}

SEED = 11


def build(device):
    candidate = Candidate(make=lambda: mine.work, error=lambda call: 0.0, tolerance=0)
    return Bench([(torch.ones(10),)], torch.sin, {{"mine": candidate}}, Cost(bytes=80, flops=10), frozen=True)


def workloads(quick):
    return [Workload(f"speed/{{mine.NAME}}", "speed", build)]
"""
MINE = "import torch\nNAME = {name!r}\nwork = torch.sin\n"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A repository of two commits with its own bench/, kernels/, ddpm/ and export/, none of which can be ours."""
    root = tmp_path / "theirs"
    for name in OURS:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(f"raise SystemExit('their {name} was imported')\n")
    (root / "speed.py").write_text(SUITE.format(more=""))
    for name in ("one", "two"):
        (root / "mine.py").write_text(MINE.format(name=name))
        if name == "one":
            git(root, "init", "-q")
        commit(root, name)
    monkeypatch.chdir(root)
    monkeypatch.setattr(machine, "repository", lambda: root)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield root
    sys.modules.pop("mine", None)


def test_a_process_has_our_packages_and_their_own(foreign):
    with packages.runner() as ours:
        side = checkouts.Checkout(foreign, foreign, (ours,), {}, ())
        assert checkouts._names("head", side, checkouts._Suites(("speed.py",)), True, 60) == ["speed/two"]
    assert not ours.exists()
    assert Path(bench.__file__).exists()


@pytest.mark.long
def test_each_side_measures_its_own_code_with_our_packages(foreign):
    suite = str(foreign / "speed.py")
    with checkouts.checkouts("one", "two", [suite], True, "") as found:
        assert found.gone == ["speed/one"]  # base knows it, and head does not any more
        assert found.new == ["speed/two"]
        for side, name in (("base", "one"), ("head", "two")):
            checkout = found.sides[side]
            line = ["--suite", *checkout.suites, "--quick", "--rounds", "1"]
            content = run_child(checkout.folder, 0, line, paths=checkout.paths, extra=checkout.extra)
            assert {record["workload"] for record in content["records"]} == {f"speed/{name}"}
            assert content["failed"] == 0
            assert content["seed"] == 11


def test_a_suite_may_ask_all_finders_to_look_again(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    packages.install()
    assert packages.OursFirst in sys.meta_path
    importlib.invalidate_caches()


def test_ours_come_before_pythonpath_and_the_working_directory(foreign):
    """As from a wheel: the four folders beside other packages, and no checkout around them."""
    site = foreign.parent / "site"
    for name in OURS:
        shutil.copytree(packages.ROOT / name, site / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (foreign / "bench").rename(foreign / "other")  # python itself would take it before anything of ours runs
    line = [sys.executable, "-m", "bench", "compare", "one", "two"]
    paths = os.pathsep.join((str(foreign), str(site)))
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, cwd=foreign, capture_output=True, text=True)
    assert done.stderr == (
        f'error: --suite: got none for {foreign}, needs --suite FILE.py, or suites = ["FILE.py"] under '
        "[tool.ddpm-bench] in its pyproject.toml (docs/ci.md of fused-ddpm shows one)\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize(
    "line",
    [pytest.param("import kernels", marks=pytest.mark.long), "from ddpm import anything", "import export as other"],
)
def test_a_name_that_both_have_is_refused_with_both_folders(foreign, capsys, line):
    (foreign / "speed.py").write_text(SUITE.format(more=line))
    commit(foreign, "three")
    name = line.split()[1]
    assert main(["compare", "one", "three", "--suite", "speed.py"]) == 2
    assert re.fullmatch(
        rf"error: head: speed\.py: imports {name}, which is \S+/head/{name} and, of fused-ddpm, {packages.ROOT / name}"
        r": a process can have one of them, the former needs another name\n",
        capsys.readouterr().err,
    )


def test_what_is_measured_may_not_import_it_either_even_late_or_with_a_way_out(foreign, monkeypatch):
    late = "def work():\n    try:\n        import kernels\n    except ImportError:\n        pass\n"
    (foreign / "mine.py").write_text(late)
    monkeypatch.syspath_prepend(foreign)
    refuse_clashes(foreign, foreign / "speed.py")
    import mine

    with pytest.raises(BadInput, match=r"mine\.py: imports kernels, which is .*theirs/kernels and"):
        mine.work()
    import kernels  # here it is ours

    assert Path(kernels.__file__).is_relative_to(packages.ROOT)


def test_a_submodule_with_our_packages_is_no_clash(tmp_path, monkeypatch):
    ours = tmp_path / "libs" / "fused-ddpm"
    (ours / "bench").mkdir(parents=True)
    (ours / "bench" / "__init__.py").write_text("Bench = 1\n")
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    scope = {"__file__": str(tmp_path / "speed.py"), "__name__": "speed"}
    (ours / "pyproject.toml").write_text("[project]\nname = 'fused-ddpm'\n")
    refuse_clashes(tmp_path, tmp_path / "speed.py", [ours])
    exec("from bench import Bench", scope)  # noqa: S102
    assert scope["Bench"] is bench.Bench
    (ours / "pyproject.toml").unlink()
    refuse_clashes(tmp_path, tmp_path / "speed.py", [ours])
    with pytest.raises(BadInput, match="imports bench, which is"):
        exec("from bench import Bench", scope)  # noqa: S102


def test_without_a_clash_nothing_is_watched(tmp_path, monkeypatch):
    plain = builtins.__import__
    (tmp_path / "mine").mkdir()
    refuse_clashes(tmp_path, tmp_path / "speed.py")
    refuse_clashes(packages.ROOT, tmp_path / "speed.py")
    assert builtins.__import__ is plain


def test_whose_checkout_it_is(tmp_path):
    assert is_ours(packages.ROOT)
    assert not is_ours(tmp_path)
    for text, ours in (("[project]\nname = 'fused-ddpm'", True), ("[project]\nname = 'other'", False), ("[", False)):
        (tmp_path / "pyproject.toml").write_text(text)
        assert is_ours(tmp_path) == ours


def test_ours_are_first_in_the_path_of_a_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("lib", "", "/ours")))
    own = environment([Path("/ours"), Path("/theirs")], extra={"WHOSE": "theirs"})
    assert own["PYTHONPATH"].split(os.pathsep) == ["/ours", "/theirs", "lib"]
    assert own["WHOSE"] == "theirs"
