"""The command line as a process: exit codes, signals, and the memory that it keeps."""

import signal
import subprocess
import sys
import time

import pytest
import typer

from ddpm import command_line
from ddpm.files import replacing


def test_a_process_exits_2_with_one_line_and_no_traceback(tmp_path, spawn):
    process = spawn("sample", tmp_path / "gone", "--out", tmp_path / "new.png")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err == f"error: {tmp_path / 'gone'}: no such run folder\n"
    assert not list(tmp_path.iterdir())


FAULTS = """
import resource, torch
from ddpm.commands import keep_freed_memory

def faults():
    for _ in range(12):  # the first leave small pieces between them, of which glibc keeps seven
        torch.zeros(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

taken_anew = faults()
keep_freed_memory()
print(taken_anew, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_is_kept_between_operators():
    """Five times 64 MiB: 16,384 pages of 4 KiB each, in fewer faults where the system gives larger ones."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    taken_anew, kept = map(int, done.stdout.split())
    assert taken_anew > 50
    assert kept < taken_anew / 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_that_falls_into_a_destructor_stops_all_the_same(number, code, capsys):
    """Where Python ignores what is raised."""
    app = typer.Typer()

    class Last:
        def __del__(self):
            signal.raise_signal(number)

    @app.command()
    def work() -> None:
        Last()
        time.sleep(10)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command_line.run(lambda _: app, "work", []) == code
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_stopped_leaves_nothing_half_written(number, code, tmp_path):
    app = typer.Typer()
    path = tmp_path / "out.txt"
    path.write_text("before")

    @app.command()
    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            signal.raise_signal(number)

    handler = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    try:
        assert command_line.run(lambda _: app, "write", []) == code
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["before"]
    assert signal.getsignal(signal.SIGTERM) == handler
