"""`dirty` says whether what is measured differs from the commit, and nothing else."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from bench import machine
from tests.bench.foreign import commit, git

CPU = torch.device("cpu")


@pytest.fixture(params=["fused-ddpm", "another"])
def repository(request, tmp_path, monkeypatch):
    """A throw-away repository of this project, and of another one: (root, whether it is ours)."""
    root = tmp_path / "repository"
    for name in ("bench/results", "kernels", "docs", "tests", "runs"):
        (root / name).mkdir(parents=True)
    (root / "pyproject.toml").write_text(f"[project]\nname = '{request.param}'\n")
    (root / ".gitignore").write_text("ignored.py\n")
    for name in (
        "kernels/a b.py",
        "kernels/native.cpp",
        "bench/results/run.jsonl",
        "docs/picture.png",
        "tests/test_a.py",
    ):
        (root / name).write_text("as it was\n")
    git(root, "init", "-q")
    commit(root, "base")
    monkeypatch.setattr(machine, "repository", lambda: root)
    return root, request.param == "fused-ddpm"


def dirty():
    return machine.describe(CPU)["dirty"]


def test_results_pictures_runs_and_outputs_do_not_count(repository):
    root, _ = repository
    assert dirty() is False
    for name in ("bench/results/run.jsonl", "docs/picture.png"):  # tracked
        (root / name).write_text("new")
    for name in ("bench/results/new.json", "bench/results/note.md", "kernels/ignored.py", "runs/c.json", "out.json"):
        (root / name).write_text("new")
    assert dirty() is False


@pytest.mark.parametrize("name", ["kernels/a b.py", "kernels/native.cpp", "kernels/new.py", "bench/new.h"])
def test_sources_in_the_packages_count_tracked_or_not(repository, name):
    root, _ = repository
    (root / name).write_text("new\n")
    assert dirty() is True
    assert machine.changed() == [name]


def test_a_source_that_was_removed_staged_or_renamed_counts(repository):
    root, _ = repository
    git(root, "mv", "kernels/a b.py", "kernels/c.py")
    assert sorted(machine.changed()) == ["kernels/a b.py", "kernels/c.py"]
    shutil.rmtree(root / "kernels")
    assert dirty() is True


def test_sources_outside_our_packages_count_in_another_project_only(repository):
    root, ours = repository
    (root / "tests" / "test_a.py").write_text("new\n")
    assert dirty() is not ours
    (root / "speed.py").write_text("new\n")
    assert len(machine.changed()) == (0 if ours else 2)


def test_what_makes_times_incomparable_is_described():
    found = machine.describe(CPU)
    assert found["cores"] == machine.cores() >= 1
    assert found["capability"] == torch.backends.cpu.get_cpu_capability()
    if "avx2" in machine._flags():
        assert "avx2" in found["flags"].split()
    assert not {"smep", "smap", "constant_tsc", "hypervisor"} & set(found["flags"].split())


@pytest.mark.skipif(machine._busy_seconds() is None, reason="this system does not say what others compute")
def test_load_is_what_others_compute_not_what_this_process_and_its_children_do():
    code = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
    load = machine.Load()
    subprocess.run([sys.executable, "-S", "-c", code.format(0.5)], check=True)
    quiet = load.others()
    # One whose parent has ended is nobody's child: it is the others.
    orphan = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {code.format(1.5)!r}])"
    subprocess.run([sys.executable, "-S", "-c", orphan], check=True)
    load = machine.Load()
    time.sleep(1)
    record = load.record()
    assert record["others"] > 0.3  # of a core, on a machine with more to do
    assert 0 <= quiet <= machine.cores()
    assert record.keys() == {"begin", "end", "others"}


def test_a_busy_machine_is_one_line_with_its_load(monkeypatch, capsys):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert machine.warning_of(None) is None
    assert machine.warning_of(1.5) is None
    line = machine.warning_of(2.0)
    assert "load 2.0 on 4 cores" in line
    assert machine.warn(line)
    assert not machine.warn(None)
    assert capsys.readouterr().err == f"{line}\n"
    loads = [{"begin": 1.0, "end": 2.0, "others": 0.5}, {"begin": 2.0, "end": 3.0, "others": 1.5}]
    assert machine.overall(loads) == {"begin": 1.0, "end": 3.0, "others": 1.0}
    assert machine.overall([None]) is None
