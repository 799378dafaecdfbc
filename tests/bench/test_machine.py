"""`dirty` says whether what is measured differs from the commit, and nothing else."""

import shutil

import pytest
import torch

from bench import machine
from tests.bench.prove_compare import commit, git

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
        "bench/results/run.json",
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
    for name in ("bench/results/run.json", "docs/picture.png"):  # tracked
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
