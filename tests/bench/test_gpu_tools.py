"""Parts `tests`, `sanitizer` and `profile` of `ddpm-bench gpu`, with stand-ins for NVIDIA's tools."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.gpu import command, launches, measured, tools
from bench.gpu.record import FAILED, PASSED, SKIPPED, Record, verdict
from bench.kernels import image_workloads
from bench.machine import ROOT
from bench.static.cases import CASES
from bench.suites import cuda

CPU = torch.device("cpu")
PROGRAM = (sys.executable, "-c", "print('launched 3')")


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(name, script): an executable of this name, a bash script, alone on the PATH with the system's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, script):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    return make


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# --- sanitizer --------------------------------------------------------------------------------------------------

PLANTED = 'if [ "${@: -1}" = planted ]; then echo "========= Invalid __global__ write"; '
PLANTED += 'echo "========= ERROR SUMMARY: 8 errors"; exit 86; fi'
CLEAN = '[ "$2" = racecheck ] && word=RACECHECK || word=ERROR; echo "========= $word SUMMARY: 0 errors"'


def check(out, program=PROGRAM, seconds=60):
    record = Record(out, "sanitizer").start(CPU)
    tools.sanitizer(record, seconds, program)
    assert json.loads((out / "sanitizer.json").read_text()) == record.content
    return record.content


def test_a_clean_program_passes_and_says_under_which_tools(tool, out):
    tool("compute-sanitizer", f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {out}/cache; {PLANTED}; {CLEAN}')
    content = check(out)
    assert verdict(content) == (PASSED, "")
    runs = [(run["run"], run["exit"], run["summary"]) for run in content["records"]]
    assert runs == [
        ("memcheck planted", 86, "ERROR SUMMARY: 8 errors"),
        ("memcheck", 0, "ERROR SUMMARY: 0 errors"),
        ("racecheck", 0, "RACECHECK SUMMARY: 0 errors"),
    ]
    assert (out / "cache").read_text() == "1\n"
    assert "RACECHECK SUMMARY: 0 errors" in command.table(content["records"])


def test_the_program_is_run_in_shares_first(tool, out):
    tool("compute-sanitizer", f"{PLANTED}; {CLEAN}")
    program = (sys.executable, "-c", f"import sys; open('{out}/' + sys.argv[1].replace('/', ' of '), 'w')")
    with_argument = f"[ $# = 4 ] && exit 0; {PLANTED}; {CLEAN}"
    tool("compute-sanitizer", with_argument)
    assert verdict(check(out, program))[0] == PASSED
    assert len(list(out.glob("* of 8"))) == tools.SHARES == 8


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"{PLANTED}; echo '========= ERROR SUMMARY: 3 errors'; exit 86", "memcheck: 3 errors; racecheck: 3 errors"),
        (
            f"{PLANTED}; echo '========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'; exit 86",
            "memcheck: 2 errors; racecheck: 2 errors",
        ),
        # A tool that sees nothing, and one that ends without a summary.
        (
            CLEAN,
            "memcheck planted: found no error where one was planted (exit code 0: ========= ERROR SUMMARY: 0 errors)",
        ),
        (f"{PLANTED}; echo lost; exit 1", "memcheck: exit code 1: lost; racecheck: exit code 1: lost"),
        (f"{PLANTED}; echo lost", "memcheck: exit code 0: lost; racecheck: exit code 0: lost"),
    ],
)
def test_errors_and_blind_tools_fail(tool, out, script, why):
    tool("compute-sanitizer", script)
    assert verdict(check(out)) == (FAILED, why)


def test_a_tool_that_refuses_the_machine_is_skipped_and_not_passed(tool, out, capsys):
    tool("compute-sanitizer", "echo '========= Error: Device not supported'; exit 1")
    content = check(out)
    status, why = verdict(content)
    assert status == SKIPPED
    assert "memcheck: compute-sanitizer: Error: Device not supported" in why
    assert "racecheck skipped" in capsys.readouterr().err


def test_a_missing_tool_is_skipped(tool, out, monkeypatch):
    monkeypatch.setattr(tools, "located", lambda name: None)
    assert verdict(check(out)) == (SKIPPED, "compute-sanitizer: it is not on this machine")


def test_a_program_that_fails_by_itself_is_not_checked(tool, out):
    tool("compute-sanitizer", CLEAN)
    content = check(out, (sys.executable, "-c", "raise SystemExit('broken')"))
    assert verdict(content) == (FAILED, "the program alone: exit code 1: broken")
    assert content["records"] == []


def test_without_time_it_fails(tool, out):
    tool("compute-sanitizer", CLEAN)
    assert verdict(check(out, seconds=0))[0] == FAILED


# --- the program under the tools --------------------------------------------------------------------------------


def test_every_operator_and_every_case_is_launched():
    names = [name for name, _ in launches.launches(CPU)]
    assert {name.removeprefix("case ") for name in names if name.startswith("case ")} == set(CASES)
    assert {"solver_step fp32", "solver_step bf16", "solver_step fp16", "bottleneck bf16"} <= set(names)
    assert not any(name.startswith("case ") for name, _ in launches.launches(CPU, "768"))
    assert [name for name, _ in launches.launches(CPU, launches.PLANTED)] == [launches.PLANTED]


@pytest.mark.long
def test_they_run(triton_device, monkeypatch, capsys):
    monkeypatch.setattr(launches, "TYPES", {"fp32": torch.float32})
    monkeypatch.setattr(launches, "workloads", image_workloads)  # the interpreter is slow with the others
    few = ("noise_mse fp32 ragged", "q_sample fp32 channels_last")
    monkeypatch.setattr(launches, "CASES", {name: CASES[name] for name in few})
    monkeypatch.setattr(launches, "TINY", 768)
    names = [name for name, _ in launches.launches(triton_device)]
    for k in range(2):
        launches.main(f"{k}/2", triton_device)
        printed = capsys.readouterr().out.splitlines()
        assert printed == [*names[k::2], f"launched {len(names[k::2])}"]
    assert names[-2:] == [f"case {name}" for name in few]


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
    monkeypatch.setattr(tools, "WORKERS", 0)  # of xdist: none beside the process itself


def pytest_on(*which, seconds=120):
    record = Record(which[0].parent, "tests").start(CPU)
    tools.tests(record, seconds, list(map(str, which)))
    return record.content


@pytest.mark.parametrize(("expected", "passed"), [("n", 3), ("0", 2)])
def test_counts_failures_and_skips_are_kept(one_worker, out, expected, passed):
    (out / "test_some.py").write_text(FILE.format(expected))
    content = pytest_on(out / "test_some.py", "-rfEs")
    (run,) = content["records"]
    assert f"{passed} passed, 1 skipped" in run["summary"]
    assert any("no device" in line for line in run["lines"])
    if passed == 3:
        assert verdict(content) == (PASSED, "")
    else:
        assert verdict(content) == (FAILED, "1 tests failed")
        assert "\nFAILED" in command.table(content["records"])


def test_no_test_and_no_time_are_failures(one_worker, out):
    (out / "test_none.py").write_text("import pytest\npytestmark = pytest.mark.skip\ndef test_a(): pass\n")
    assert verdict(pytest_on(out / "test_none.py")) == (FAILED, "no test passed")
    status, why = verdict(pytest_on(out / "test_none.py", seconds=0.1))
    assert (status, why[:7]) == (FAILED, "stopped")


@pytest.mark.long
def test_what_is_asked_for_is_there():
    """A test that was renamed would be an error only where there is a GPU."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tools.PATHS]
    line += [f"--ignore={path}" for path in tools.ELSEWHERE]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all((ROOT / path).exists() for path in (*tools.ELSEWHERE, tools.ONNX))
    for path in tools.PATHS:
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


HEADER = ["ID", "Host Name", "Kernel Name", *tools.METRICS]
UNITS = ["", "", "", "ns", "byte", "%", "%", "register/thread"]
VALUES = ["0", "here", "solver_step_kernel", "1,234", "2,468", "88.5", "50", "40"]
CUT_OFF = [*VALUES[:5], "n/a", "50", "40"]
CSV = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (HEADER, UNITS, VALUES, CUT_OFF))


@pytest.fixture
def begun(out):
    """A profile whose first half was measured."""
    record = Record(out, "profile").start(CPU)
    record.keep({"workload": "graph batch1", "kernel": "all", "wall_us": 2.0, "us": 1.0})
    return record


def ncu(lines, end="exit 0"):
    return f"cat <<'END'\n==PROF== Connected\nlaunched 1\n{lines}\nEND\n{end}"


def counted(record):
    tools.counters(record, 60, PROGRAM)
    return record.content


def test_counters_are_kept_with_what_follows_from_them(tool, begun):
    tool("ncu", ncu(CSV))
    content = counted(begun)
    assert content["failures"] == []
    _, row = content["records"]
    assert (row["workload"], row["kernel"]) == ("ncu", "solver_step_kernel")
    assert (row["ns"], row["dram_bytes"], row["registers"]) == (1234, 2468, 40)
    assert (row["us"], row["gb_per_s"], row["issue_percent"]) == (1.234, 2.0, 88.5)
    assert "solver_step_kernel" in command.table(content["records"])


def test_ncu_that_may_not_read_counters_is_skipped(tool, begun):
    tool("ncu", "echo '==ERROR== Failed to initialize the profiler: LibraryNotLoaded'; exit 1")
    content = counted(begun)
    assert content["skipped"] == {"ncu": "ERROR== Failed to initialize the profiler: LibraryNotLoaded"}
    assert content["failures"] == []


def test_ncu_that_fails_or_is_missing(tool, begun, monkeypatch):
    tool("ncu", ncu("", "exit 9"))
    assert counted(begun)["failures"] == ["ncu: exit code 9: launched 1"]
    monkeypatch.setattr(tools, "located", lambda name: None)
    assert counted(begun)["skipped"] == {"ncu": "it is not on this machine"}


def test_the_halves_of_the_profile_share_its_time(out, monkeypatch):
    given = []

    def child(record, seconds):
        given.append(seconds)
        if len(given) == 1:
            record.keep({"workload": "graph batch1"})

    monkeypatch.setattr(command, "in_child", child)
    monkeypatch.setattr(tools, "located", lambda name: None)
    for status in (PASSED, FAILED):
        record = Record(out, "profile").start(CPU)
        command.profile(record, 60)
        assert verdict(record.content)[0] == status
    assert given == [30, 30]
