"""Parts `tests` and `profile` of `ddpm-bench gpu`, with a stand-in for what a GPU shows."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.gpu import command, measured
from bench.gpu.command import FAILED, PASSED, Record, verdict
from bench.machine import ROOT
from bench.suites import cuda

CPU = torch.device("cpu")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# --- tests ------------------------------------------------------------------------------------------------------

FILE = """
import pytest
def test_one(): pass
@pytest.mark.parametrize("n", range(2))
def test_two(n): assert n == {}
@pytest.mark.skipif(True, reason="no device")
def test_three(): pass
"""


@pytest.fixture
def one_worker(monkeypatch):
    monkeypatch.setattr(command, "WORKERS", 0)  # of xdist: none beside the process itself


def pytest_on(*which, seconds=120):
    record = Record(which[0].parent, "tests").start(CPU)
    command.tests(record, seconds, list(map(str, which)))
    return record.content


@pytest.mark.parametrize(("expected", "passed"), [("n", 3), ("0", 2)])
def test_counts_failures_and_skips_are_kept(one_worker, out, capsys, expected, passed):
    (out / "test_some.py").write_text(FILE.format(expected))
    content = pytest_on(out / "test_some.py", "-rfEs")
    (run,) = content["records"]
    assert f"{passed} passed, 1 skipped" in run["summary"]
    assert any("no device" in line for line in run["output"])
    if passed == 3:
        assert verdict(content) == (PASSED, "")
    else:
        assert verdict(content) == (FAILED, run["summary"])
        assert "1 failed" in run["summary"]
        assert "\nFAILED" in capsys.readouterr().err


def test_no_test_and_no_time_are_failures(one_worker, out):
    (out / "test_none.py").write_text("import pytest\npytestmark = pytest.mark.skip\ndef test_a(): pass\n")
    status, why = verdict(pytest_on(out / "test_none.py"))
    assert (status, why[:24]) == (FAILED, "exit code 0: 1 skipped i")
    status, why = verdict(pytest_on(out / "test_none.py", seconds=0.1))
    assert (status, why[:7]) == (FAILED, "stopped")


@pytest.mark.long
def test_what_is_asked_for_is_there():
    """A test that was renamed would be an error only where there is a GPU."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *command.PATHS]
    line += [f"--ignore={path}" for path in command.ELSEWHERE]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all((ROOT / path).exists() for path in (*command.ELSEWHERE, command.ONNX))
    for path in command.PATHS:
        assert path in done.stdout, path
    assert "test_static.py" not in done.stdout


# --- profile ----------------------------------------------------------------------------------------------------


def event(key, count, microseconds, device=DeviceType.CUDA):
    return SimpleNamespace(key=key, count=count, self_device_time_total=microseconds, device_type=device)


class Profiler:
    """In the place of torch.profiler's, with what a GPU would show."""

    def __init__(self, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def key_averages(self):
        steps = measured.STEPS
        return [event("solver", steps, 20.0), event("conv", 3 * steps, 300.0), event("aten", 9, 0.0, DeviceType.CPU)]


def traced(out):
    record = Record(out, "profile").start(CPU)
    measured.trace(record, CPU, 0.0, [("fused", 1)], torch.float32)
    return record


def test_kernels_are_counted_per_step_the_longest_first(out, monkeypatch):
    monkeypatch.setattr(measured, "profile", Profiler)
    record = traced(out)
    whole, *rows = record.content["records"]
    assert (whole["kernel"], whole["calls"], whole["us"]) == ("all", 4, 32)
    assert whole["wall_us"] > 0
    name = {"workload": "fused batch1"}
    assert rows == [name | {"kernel": "conv", "calls": 3, "us": 30}, name | {"kernel": "solver", "calls": 1, "us": 2}]
    assert record.content["failures"] == []
    assert record.content["seed"] == cuda.SEED
    assert record.content["dtype"] == "float32"


def test_a_profile_without_kernels_fails(out):
    """As on the CPU, where everything but the device's part runs."""
    assert traced(out).content["failures"] == ["fused batch1: no kernel in the profile"]
