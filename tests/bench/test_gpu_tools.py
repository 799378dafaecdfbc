"""Parts `tests`, `sanitizer` and `profile` of `ddpm-bench gpu`, with stand-ins for NVIDIA's tools."""

import gzip
import json
import subprocess
import sys

import pytest
import torch

from bench.gpu import launches, profile, sanitizer, tests
from bench.gpu.record import FAILED, PASSED, SKIPPED, Record, verdict
from bench.kernels import image_workloads
from bench.machine import ROOT
from bench.static.cases import CASES

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
    content = sanitizer.run_sanitizer(out, CPU, seconds, program)
    assert json.loads((out / "sanitizer.json").read_text()) == content
    return content


def test_a_clean_program_passes_and_says_under_which_tools(tool, out):
    tool("compute-sanitizer", f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {out}/cache; {PLANTED}; {CLEAN}')
    content = check(out)
    assert verdict(content) == (PASSED, "")
    runs = [(run["tool"], run["exit"], run["errors"]) for run in content["records"]]
    assert runs == [("memcheck planted", 86, 8), ("memcheck", 0, 0), ("racecheck", 0, 0)]
    assert [run["last_line"] for run in content["alone"]] == [["launched 3"]] * sanitizer.SHARDS
    assert (out / "cache").read_text() == "1\n"
    assert "racecheck" in sanitizer.table(content)


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
    monkeypatch.setattr(sanitizer, "located", lambda name: None)
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
    assert not any(name.startswith("case ") for name, _ in launches.launches(CPU, cases=False))


@pytest.mark.long
def test_they_run(triton_device, monkeypatch, capsys):
    monkeypatch.setattr(launches, "TYPES", (torch.float32,))
    monkeypatch.setattr(launches, "workloads", image_workloads)  # the interpreter is slow with the others
    few = ("noise_mse fp32 ragged", "q_sample fp32 channels_last")
    monkeypatch.setattr(launches, "CASES", {name: CASES[name] for name in few})
    monkeypatch.setattr(launches, "TINY", 768)
    names = [name for name, _ in launches.launches(triton_device)]
    for k in range(2):
        launches.main(["shard", str(k), "2"], triton_device)
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
    monkeypatch.setattr(tests, "WORKERS", 0)  # of xdist: none beside the process itself


@pytest.mark.parametrize(("expected", "passed"), [("n", 3), ("0", 2)])
def test_counts_failures_and_skips_are_kept(one_worker, out, expected, passed):
    (out / "test_some.py").write_text(FILE.format(expected))
    content = tests.run_tests(out, CPU, 120, [str(out / "test_some.py"), "-rfEs"])
    (run,) = content["records"]
    assert run["counts"] == {"passed": passed, "failed": 3 - passed, "error": 0, "skipped": 1}
    assert any("no device" in line for line in run["lines"])
    if passed == 3:
        assert verdict(content) == (PASSED, "")
    else:
        assert verdict(content) == (FAILED, "1 tests failed")
        assert "FAILED" in tests.table(content)


def test_no_test_and_no_time_are_failures(one_worker, out):
    (out / "test_none.py").write_text("import pytest\npytestmark = pytest.mark.skip\ndef test_a(): pass\n")
    assert verdict(tests.run_tests(out, CPU, 120, [str(out / "test_none.py")])) == (FAILED, "no test passed")
    status, why = verdict(tests.run_tests(out, CPU, 0.1, [str(out / "test_none.py")]))
    assert (status, why[:7]) == (FAILED, "stopped")


@pytest.mark.long
def test_what_is_asked_for_is_there():
    """A test that was renamed would be an error only where there is a GPU."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests.PATHS]
    line += [f"--ignore={path}" for path in tests.ELSEWHERE]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all((ROOT / path).exists() for path in (*tests.ELSEWHERE, tests.ONNX))
    for path in tests.PATHS:
        assert path in done.stdout, path
    assert "test_static.py" not in done.stdout


# --- profile ----------------------------------------------------------------------------------------------------


def event(name, begin, duration, category="kernel"):
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": duration}


TRACE = {
    "traceEvents": [
        event("batch1", 0, 100, "user_annotation"),
        event("batch1", 0, 100, "gpu_user_annotation"),
        event("batch64", 200, 300, "user_annotation"),
        event("conv", 10, 30),
        event("conv", 50, 30),
        event("solver", 70, 20),  # half of it beside the convolution
        event("conv", 210, 250),
        event("aten::conv2d", 5, 90, "cpu_op"),
    ]
}


def test_kernels_are_counted_within_their_range():
    found = profile.kernels_of(TRACE, "batch1", 2)
    assert found["busy_us"] == 35
    assert found["wall_us"] == 50
    assert found["kernels"] == [
        {"kernel": "conv", "calls_per_step": 1, "us_per_step": 30, "share": round(60 / 70, 4)},
        {"kernel": "solver", "calls_per_step": 0.5, "us_per_step": 10, "share": round(20 / 70, 4)},
    ]
    assert profile.kernels_of(TRACE, "batch64", 2)["kernels"][0]["us_per_step"] == 125


def test_a_trace_without_kernels_fails(out):
    """As on the CPU, where everything but the device's part runs."""
    content = profile.run_trace(out, CPU, 60, batches=(1,), engines=("fused",), dtype=torch.float32)
    assert content["failures"] == ["fused batch1: no kernel in the trace"]
    trace = json.loads(gzip.decompress((out / profile.TRACE).read_bytes()))
    assert "fused batch1" in {event["name"] for event in trace["traceEvents"]}
    assert "fused batch1 float32: a step" in profile.table(content)


HEADER = ["ID", "Host Name", "Kernel Name", *profile.METRICS]
UNITS = ["", "", "", "ns", "byte", "byte", "%", "%", "register/thread", ""]
VALUES = ["0", "here", "solver_step_kernel", "1,234", "1000", "234", "88.5", "50", "40", "99"]
CSV = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (HEADER, UNITS, VALUES))


@pytest.fixture
def begun(out):
    """A profile whose trace was taken."""
    record = Record.start(out, "profile", 60, CPU, dtype="bfloat16")
    record.add({"workload": "batch1", "wall_us": 2.0, "busy_us": 1.0, "kernels": []})
    return out


def ncu(lines, end="exit 0"):
    """A script that writes these lines to ncu's --log-file."""
    return (
        f'while [ $# -gt 0 ]; do [ "$1" = --log-file ] && cat > "$2" <<\'END\'\n==PROF== Connected\n{lines}\nEND\n'
        f"shift; done; {end}"
    )


def test_counters_are_kept_as_a_table_and_as_a_file(tool, begun):
    tool("ncu", ncu(CSV))
    content = profile.run_counters(begun, 60, PROGRAM)
    assert verdict(content) == (PASSED, "")
    (row,) = content["counters"]
    assert row["kernel"] == "solver_step_kernel"
    assert (row["ns"], row["dram_bytes_read"], row["registers"]) == (1234, 1000, 40)
    assert (begun / profile.COUNTERS).read_text() == CSV + "\n"
    assert "solver_step_kernel" in profile.table(content)


def test_ncu_that_may_not_read_counters_is_skipped(tool, begun):
    tool("ncu", "echo '==ERROR== Failed to initialize the profiler: LibraryNotLoaded'; exit 1")
    content = profile.run_counters(begun, 60, PROGRAM)
    assert content["skipped"] == {"ncu": "ERROR== Failed to initialize the profiler: LibraryNotLoaded"}
    assert not (begun / profile.COUNTERS).exists()


def test_ncu_that_fails_or_is_missing(tool, begun, monkeypatch):
    tool("ncu", ncu("", "exit 9"))
    assert verdict(profile.run_counters(begun, 60, PROGRAM)) == (FAILED, "ncu: exit code 9")
    monkeypatch.setattr(profile, "located", lambda name: None)
    assert profile.run_counters(begun, 60, PROGRAM)["skipped"] == {"ncu": "it is not on this machine"}


def test_the_parts_of_the_profile_share_its_time_and_leave_nothing_old(begun, monkeypatch):
    (begun / profile.TRACE).write_text("old")
    (begun / profile.COUNTERS).write_text("old")
    monkeypatch.setattr(profile, "located", lambda name: None)
    given = []
    profile.run_profile(begun, CPU, 60, given.append)
    assert given == [30]
    assert not (begun / profile.TRACE).exists()
    assert not (begun / profile.COUNTERS).exists()
