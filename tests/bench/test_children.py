"""Processes that measure: how they end is told with whose they were and their row, and nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from bench import children, status
from bench.children import environment, python, run_child
from bench.cli import main
from bench.machine import ROOT
from ddpm.errors import BadInput, WorkFailed

SUITE = """
import os, signal, subprocess, sys, time
import torch
from bench import Bench, Candidate, Cost, Workload

def bad(x, calls=[0]):
    calls[0] += 1
    {bad}
    return torch.sin(x)

def build(device):
    fine = Candidate(make=lambda: torch.sin, error=lambda call: 0.0, tolerance=0)
    mine = Candidate(make=lambda: bad, error=lambda call: 0.0, tolerance=0)
    return Bench([(torch.ones(10),)], torch.sin, {{"fine": fine, "mine": mine}}, Cost(bytes=80, flops=10), frozen=True)

def workloads(quick):
    return [Workload("speed/a", "speed", build)]
"""
# Starts a process of its own, which would live on, and waits.
HANG = "print(subprocess.Popen(['sleep', '987']).pid, file=open('pid', 'w'), flush=True); time.sleep(600)"


def alive(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def waited(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, in no repository, whose temporary files lie in `tmp`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.setattr("tempfile.tempdir", None)


def child(folder, **options):
    line = ["--suite", "speed.py", "--rounds", "2"]
    return run_child(folder, 0, line, paths=[ROOT], side="head", **options)


def test_a_segfault_names_side_row_and_file(folder):
    (folder / "speed.py").write_text(SUITE.format(bad="if calls[0] > 9: os.kill(os.getpid(), signal.SIGSEGV)"))
    rows = []
    with pytest.raises(WorkFailed, match=r"^head: killed by SIGSEGV in row speed/a mine of speed\.py$"):
        child(folder, on_row=rows.append)
    assert "in row speed/a mine of speed.py" in rows


@pytest.mark.long
def test_a_hang_ends_in_time_with_its_row_and_with_all_that_it_started(folder):
    (folder / "speed.py").write_text(SUITE.format(bad=HANG))
    with pytest.raises(WorkFailed, match=r"^head: no end after 20 s \(--timeout\) in row speed/a mine of speed\.py$"):
        child(folder, timeout=20)
    assert waited(lambda: not alive(int((folder / "pid").read_text())), 5)
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param(
            {"speed.py": "\nimport gone\n"},
            "head: speed.py:2: ModuleNotFoundError: No module named 'gone'",
            marks=pytest.mark.long,
        ),
        (
            {"speed.py": "import mine\n", "src/mine.py": "\n\nx = 1 / 0\n"},
            "head: src/mine.py:3, from speed.py:1: ZeroDivisionError: division by zero",
        ),
        pytest.param(
            {"speed.py": "x = (\n"}, "head: speed.py:1: SyntaxError: '(' was never closed", marks=pytest.mark.long
        ),
        pytest.param(
            {"speed.py": "import sys\nsys.exit(0)\n"}, "head: speed.py:2: SystemExit: 0", marks=pytest.mark.long
        ),
        ({"speed.py": "import os\nos._exit(0)\n"}, "head: exit code 0 without a result importing speed.py"),
        pytest.param(
            {"speed.py": "import os\nos._exit(9)\n"},
            "head: exit code 9 without a result importing speed.py",
            marks=pytest.mark.long,
        ),
        ({"speed.py": "def workloads(quick):\n    return [None][1]\n"}, "speed.py:2: IndexError: list index out of"),
        pytest.param(
            {"speed.py": "def workloads(quick):\n    return 3\n"},
            "head: --suite: speed.py: workloads(quick) returned 3",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"speed.py": "def workloads(quick):\n    return []\n"},
            "workloads(False) returned none, needs at least one",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_goes_wrong_in_a_suite_names_file_and_line(folder, files, words):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises((BadInput, WorkFailed)) as caught:
        child(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_a_stop_ends_the_processes_and_leaves_nothing(folder, number, code):
    (folder / "speed.py").write_text(SUITE.format(bad=HANG))
    line = [sys.executable, "-P", "-m", "bench", "run", "--suite", "speed.py", "--processes", "2", "--out", "r.json"]
    # Tests that run in the background ignore SIGINT, and what they start would, too.
    heeding = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(line, env=environment([ROOT]), stderr=subprocess.PIPE, text=True, **heeding)
    try:
        assert waited(lambda: (folder / "pid").exists() and (folder / "pid").read_text().endswith("\n"))
        time.sleep(0.3)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert "bench: in row speed/a mine of speed.py\n" in said  # at once, before any process ended
    assert waited(lambda: not alive(int((folder / "pid").read_text())), 5)
    assert {path.name for path in folder.iterdir()} == {"tmp", "speed.py", "pid"}
    assert list((folder / "tmp").iterdir()) == []


def test_what_a_process_leaves_behind_ends_with_it(folder):
    script = "import subprocess; print(subprocess.Popen(['sleep', '987']).pid)"
    ended = python(["-c", script], folder, os.environ)
    assert ended.code == 0
    assert waited(lambda: not alive(int(ended.output)), 5)


def test_one_that_does_not_heed_is_killed_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(children, "GRACE", 0.5)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    began = time.monotonic()
    with pytest.raises(WorkFailed, match=r"^no end after 1 s \(--timeout\) at its start$"):
        python(["-c", script], folder, os.environ, timeout=1)
    assert time.monotonic() - began < 20


def test_a_status_is_whole_however_long_the_last_was(tmp_path, monkeypatch):
    monkeypatch.delenv(status.VARIABLE, raising=False)
    status.say("to nobody")
    file = tmp_path / "status"
    assert status.heard(file) == ""
    monkeypatch.setenv(status.VARIABLE, str(file))
    status.say(status.row("a" * 300, "b", "speed.py"))
    status.say(status.row("a", "b"))
    assert status.heard(file) == "in row a b"
    status.say("ä" * status.WIDTH)
    assert status.heard(file).startswith("ää")
    assert file.stat().st_size == status.WIDTH
    assert status.told("now", lambda: 3)() == 3
    assert status.heard(file) == "now"


@pytest.mark.long
def test_processes_import_what_one_alone_does(folder):
    """The package beside the suite, at the top, in src/; a helper beside a suite in a folder."""
    (folder / "benchmarks").mkdir()
    (folder / "src").mkdir()
    for name in ("top.py", "src/below.py", "benchmarks/beside.py"):
        (folder / name).write_text("")
    text = "import top, below, beside\n" + SUITE.format(bad="pass")
    (folder / "benchmarks" / "speed.py").write_text(text)
    line = ["run", "--suite", "benchmarks/speed.py", "--rounds", "2", "--quiet", "--out"]
    assert main([*line, "one.json", "--processes", "2"]) == 0
    command = [sys.executable, "-P", "-m", "bench", *line, "two.json"]
    assert subprocess.run(command, env=environment([ROOT]), check=False).returncode == 0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(folder, capsys, value):
    (folder / "speed.py").write_text(SUITE.format(bad="pass"))
    for command in (["compare", "a", "b"], ["run", "--out", "r.json", "--processes", "6"]):
        assert main([*command, "--suite", "speed.py", "--timeout", value]) == 2
        said = capsys.readouterr().err
        assert "--timeout" in said
        assert said.count("\n") == 1


def test_a_time_limit_without_processes_is_refused(folder, capsys):
    (folder / "speed.py").write_text(SUITE.format(bad="pass"))
    assert main(["run", "--suite", "speed.py", "--timeout", "5", "--out", "r.json"]) == 2
    assert "--timeout: ends processes of --processes" in capsys.readouterr().err
