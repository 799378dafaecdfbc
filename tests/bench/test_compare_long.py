"""`compare` in this project's own repository, where its bench/ measures the operators of both commits.

In another project's: planted.py, of which test_planted.py runs a part.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench.packages import OURS
from tests.bench.foreign import ROOT, commit, git
from tests.bench.planted import busy

pytestmark = [pytest.mark.long, pytest.mark.alone]

OPERATORS = ("q_sample", "solver_step", "group_norm_relu")

# Burns a share of the processor time that the operator itself took: that much slower at any size on any machine.
SLOWER = """

import time as _time

_as_it_was = solver_step


def solver_step(*arguments, **options):
    began = _time.process_time()
    result = _as_it_was(*arguments, **options)
    now = _time.process_time()
    while _time.process_time() - now < 0.3 * (now - began):
        pass
    return result
"""
CRASHING = """

def q_sample(*arguments, **options):
    raise RuntimeError("planted")
"""
# In place or not, the result is no longer the reference's.
WRONG = """

_as_it_was = group_norm_relu


def group_norm_relu(*arguments, **options):
    return _as_it_was(*arguments, **options) + 0.01
"""
GONE = """

_as_it_was = workloads


def workloads(quick):
    return [workload for workload in _as_it_was(quick) if "/noise_mse/" not in workload.name]
"""
PLANTED = {
    "same": {},
    "slower": {"kernels/solver_step.py": SLOWER},
    "crashing": {"kernels/q_sample.py": CRASHING},
    "wrong": {"kernels/group_norm_relu.py": WRONG},
    "gone": {"bench/suites/kernels.py": GONE},
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The working tree's packages as commit `base` of a repository of their own, and a branch for each of PLANTED."""
    root = tmp_path_factory.mktemp("ours") / "repository"
    for name in OURS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "-q")
    commit(root, "base")
    for branch, changes in PLANTED.items():
        git(root, "checkout", "-q", "--detach", "base")
        for name, text in changes.items():
            with (root / name).open("a") as file:
                file.write(text)
        if changes:
            commit(root, branch)
        else:
            git(root, "branch", branch)
    return root


def compare(root, head, *operators):
    """(exit code, {row: its verdict}, what it printed) of base against a branch, on a busy machine."""
    git(root, "checkout", "-q", head)
    result = root.parent / f"{head}.json"
    pattern = f"^kernels/({'|'.join(operators)})/"
    command = [sys.executable, "-m", "bench", "compare", "base", head, "--filter", pattern]
    command += ["--processes", "6", "--json", str(result)]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "160"}
    with busy():
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)
    rows = json.loads(result.read_text())["rows"] if result.exists() else []
    return done.returncode, {row["row"]: row for row in rows}, done.stdout + done.stderr


def own(row, operator):
    return row.startswith(f"kernels/{operator}/") and row.endswith(" operator")


def test_the_same_code_raises_no_alarm(repository):
    code, rows, output = compare(repository, "same", *OPERATORS)
    assert code == 0, output
    assert {row["status"] for row in rows.values()} <= {"same", "faster", "fewer", "too noisy", "not gated"}
    assert sum(row["unit"] == "us" for row in rows.values()) == 2 * len(OPERATORS)


def test_a_slower_operator_is_caught_on_its_own_row(repository):
    code, rows, output = compare(repository, "slower", *OPERATORS)
    assert code == 1, output
    assert [own(name, "solver_step") for name, row in rows.items() if row["status"] == "slower"] == [True]


def test_a_crash_fails_the_comparison(repository):
    code, rows, output = compare(repository, "crashing", "q_sample")
    assert code == 3, output
    assert "RuntimeError: planted" in output + json.dumps(rows)


def test_a_lost_parity_fails_the_comparison(repository):
    code, rows, output = compare(repository, "wrong", "group_norm_relu")
    assert code == 3, output
    assert "parity" in output + json.dumps(rows)


def test_a_benchmark_that_disappears_fails_the_comparison(repository):
    code, rows, output = compare(repository, "gone", "noise_mse", "group_norm_relu")
    assert code == 3, output
    assert "kernels/noise_mse/fp32/1e5" in [row for row, verdict in rows.items() if verdict["status"] == "missing"]
