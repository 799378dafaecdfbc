"""Part `tests`: the tests that only mean something on a GPU, in a process of their own."""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu import process
from bench.gpu.record import Content, Record

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
PROVIDER = "CUDAExecutionProvider"
# Most of the time is Triton compiling on the host and processes starting. Untuned: 16 cores were promised.
WORKERS = 8
KINDS = ("passed", "failed", "error", "skipped")
COUNTS = re.compile(rf"(\d+) ({'|'.join(KINDS)})")


def counts(output: str) -> dict[str, int]:
    """passed, failed, error and skipped of pytest's last line; empty where it did not come to one."""
    lines = [line for line in output.splitlines() if re.search(r" in \d+\.\d+s", line)]
    found = {kind: int(number) for number, kind in COUNTS.findall(lines[-1])} if lines else {}
    return {kind: found.get(kind, 0) for kind in KINDS} if found else {}


def run_tests(out: Path, device: torch.device, seconds: float, which: Sequence[str] | None = None) -> Content:
    """pytest on `which` (paths and options; default those above), into out/tests.json."""
    record = Record.start(out, "tests", seconds, device)
    if which is None:
        which = [*PATHS, *(f"--ignore={path}" for path in ELSEWHERE)]
        if not all(map(find_spec, ONNX_NEEDS)):
            record.skip(ONNX, f"needs {', '.join(ONNX_NEEDS)}")
        elif PROVIDER not in import_module("onnxruntime").get_available_providers():
            record.skip(ONNX, f"this onnxruntime has no {PROVIDER}")
        else:
            which.append(ONNX)
    workers = ["-n", str(WORKERS), "--dist", "worksteal"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider"]
    # One thread each, as in `make test`: so many workers share the cores.
    done = process.run([*command, "--durations=10", *workers, *which], seconds, {"OMP_NUM_THREADS": "1"})
    found = counts(done.output)
    short = [line for line in done.output.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    record.add({"exit": done.code, "seconds": done.seconds, "counts": found, "lines": short, "output": done.tail(40)})
    if done.code != 0:
        bad = found.get("failed", 0) + found.get("error", 0)
        record.fail(f"{bad} tests failed" if bad else done.ending())
    elif not found.get("passed"):
        record.fail("no test passed")
    if done.code is not None:
        record.finish()
    return record.content


def table(content: Content) -> str:
    """The counts, the tests that failed, why others were skipped."""
    lines = []
    for run in content["records"]:
        numbers = ", ".join(f"{run['counts'][kind]} {kind}" for kind in run["counts"])
        lines += [f"{numbers or 'no result'} in {run['seconds']:.0f} s", *(line[:200] for line in run["lines"])]
        if run["exit"] != 0 and not run["lines"]:
            lines += run["output"][-10:]
    return "\n".join(lines)
