"""Parts that run other programs: `tests` pytest, `sanitizer` compute-sanitizer, and the counters of `profile` ncu."""

import csv
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from time import monotonic
from typing import Any

from bench.gpu import process
from bench.gpu.launches import PLANTED
from bench.gpu.record import Record
from bench.kernels import SEED

# Tests that only mean something on a GPU.
PATHS = (
    "tests/kernels",
    "tests/ddpm/test_cuda.py",
    "tests/ddpm/test_kernel_form.py",
    "tests/ddpm/test_engines.py::test_a_graph_serves_other_seeds_tables_and_weights",
    "tests/ddpm/test_engines.py::test_a_graph_s_memory_comes_back",
    "tests/ddpm/test_training_engines.py::test_engines_lose_as_eager_on_cuda",
)
# Compile for cards that are not here, or import things: they need no GPU, and are in `make test`.
ELSEWHERE = ("tests/bench/test_static.py", "tests/kernels/test_import_clash.py")
ONNX, ONNX_NEEDS = "tests/export/test_cuda.py", ("onnx", "onnxscript", "onnxruntime")
# Most of the time is Triton compiling on the host and processes starting. Untuned: 16 cores were promised.
WORKERS = 8

LAUNCHES = (sys.executable, "-m", "bench.gpu.launches")
# Beside the checks a launch that writes out of bounds on purpose, since a checker that cannot see Triton's kernels
# finds no errors either.
CHECKS = {"memcheck planted": ("memcheck", PLANTED), "memcheck": ("memcheck",), "racecheck": ("racecheck",)}
# 86: of the tool when it found something, and no other program's.
# API calls that fail are no errors of kernels: libraries probe for entry points that a driver lacks.
OPTIONS = ("--error-exitcode", "86", "--target-processes", "application-only", "--report-api-errors", "no")
SHARES = 8  # processes that compile the kernels, into Triton's cache, where the tools' runs find them
# Every allocation a cudaMalloc of its own: PyTorch's cache would hide accesses beyond a tensor.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# What NVIDIA's tools say where they are installed and the machine does not let them work (gVisor, no permission).
REFUSALS = ("Device not supported", "Failed to initialize", "LibraryNotLoaded", "ERR_NVGPUCTRPERM")

ELEMENTS = 10**7  # of a launch under ncu: well past its own cost
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "dram_bytes",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
NUMBER = re.compile(r"\d+(\.\d+)?")


def _run(record: Record, name: str, done: process.Finished, summary: str, lines: Sequence[str] = ()) -> dict[str, Any]:
    """Keep a run. summary: the program's own count of what it found; lines: shown with it."""
    head = {"run": name, "exit": done.code, "seconds": done.seconds, "summary": summary or done.ending()}
    record.keep(head | {"lines": list(lines), "output": done.tail(40)})


def _last(pattern: str, text: str) -> str:
    """The last line that has it, "" without one."""
    return next((line for line in reversed(text.splitlines()) if re.search(pattern, line)), "")


def tests(record: Record, seconds: float, which: Sequence[str] | None = None) -> None:  # noqa: PT028 (no test)
    """pytest on `which` (paths and options; default those above)."""
    if which is None:
        which = [*PATHS, *(f"--ignore={path}" for path in ELSEWHERE)]
        if all(map(find_spec, ONNX_NEEDS)):
            which.append(ONNX)
        else:
            record.skip(ONNX, f"needs {', '.join(ONNX_NEEDS)}")
    workers = ["-n", str(WORKERS), "--dist", "worksteal"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", "--durations=10"]
    # One thread each, as in `make test`: so many workers share the cores.
    done = process.run([*command, *workers, *which], seconds, {"OMP_NUM_THREADS": "1"})
    summary = _last(r" in \d+\.\d+s", done.output)
    lines = [line[:200] for line in done.output.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    _run(record, "pytest", done, summary, lines)
    if done.code != 0:
        bad = sum(map(int, re.findall(r"(\d+) (?:failed|error)", summary)))
        record.fail(f"{bad} tests failed" if bad else done.ending())
    elif " passed" not in summary:
        record.fail("no test passed")
    record.keep(complete=done.code is not None)


def located(tool: str) -> str | None:
    """Where a tool of the CUDA toolkit lies, None if nowhere."""
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def refusal(output: str) -> str:
    """The line in which one of NVIDIA's tools says that it cannot work on this machine, "" without one."""
    return _last(f"^==.*({'|'.join(REFUSALS)})", output).strip("= ")


def sanitizer(record: Record, seconds: float, program: Sequence[str] = LAUNCHES) -> None:
    """Run the program alone, which compiles the kernels and shows that it runs, then under all tools at a time."""
    until = monotonic() + seconds
    record.keep(seed=SEED)
    tool = located("compute-sanitizer")
    if tool is None:
        record.skip("compute-sanitizer", "it is not on this machine")
        record.keep(complete=True)
        return

    def run(*command: str) -> process.Finished:
        return process.run(command, until - monotonic(), ENVIRONMENT)

    with ThreadPoolExecutor(SHARES) as pool:
        alone = [pool.submit(run, *program, f"{k}/{SHARES}") for k in range(SHARES)]
        bad = next((one.result() for one in alone if one.result().code != 0), None)
        if bad is not None:
            record.keep(output=bad.tail(40))
            record.fail(f"the program alone: {bad.ending()}")
            return
        checks = {
            name: pool.submit(run, tool, "--tool", kind, *OPTIONS, *program, *planted)
            for name, (kind, *planted) in CHECKS.items()
        }
        for name, check in checks.items():
            _judge(record, name, check.result())
    record.keep(complete=True)


def _judge(record: Record, name: str, done: process.Finished) -> None:
    """Keep a tool's run, and whether it found what it should: something if an error was planted, else nothing."""
    refused, summary = refusal(done.output), _last("SUMMARY: ", done.output)
    if refused:
        record.skip(name, f"compute-sanitizer: {refused}")
        return
    _run(record, name, done, summary.strip("= "))
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", summary)
    errors = int(found[1]) if found else None
    if PLANTED in name:
        if done.code is None or not errors or "Invalid __global__ write" not in done.output:
            record.fail(f"{name}: found no error where one was planted ({done.ending()})")
    elif done.code != 0 or errors != 0:
        record.fail(f"{name}: {f'{errors} errors' if errors else done.ending()}")


def counters(record: Record, seconds: float, program: Sequence[str] = (*LAUNCHES, str(ELEMENTS))) -> None:
    """Run the program, which says which launches count, under ncu; clocks are left as they are."""
    ncu = located("ncu")
    if ncu is None:
        record.skip("ncu", "it is not on this machine")
        return
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", ",".join(METRICS), "--target-processes", "application-only"]
    done = process.run([*command, *program], seconds)
    refused, found = refusal(done.output), counters_of(done.output)
    record.keep(*found)
    if refused:
        record.skip("ncu", refused)
    elif done.code != 0 or not found:
        record.fail(f"ncu: {done.ending()}")


def counters_of(text: str) -> list[dict[str, Any]]:
    """A record per launch of what ncu printed as CSV: microseconds, GB/s of DRAM, and the values of METRICS."""
    found = []
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        cells = {name: (row.get(metric) or "").replace(",", "") for metric, name in METRICS.items()}
        # Others are the line of units, one that was cut off, or one with a counter that was not available.
        if all(map(NUMBER.fullmatch, cells.values())):
            values = {name: float(cell) for name, cell in cells.items()}
            derived = {"us": values["ns"] / 1e3, "gb_per_s": values["dram_bytes"] / values["ns"]}
            found.append({"workload": "ncu", "kernel": row["Kernel Name"], "elements": ELEMENTS} | derived | values)
    return found
