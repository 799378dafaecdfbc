"""`ddpm-bench gpu`: its parts in order, each within its share of the time, each in processes that it cannot spoil.

A part begins with what the parts before it left over, and is stopped when its time is over; what it measured is in
OUT/PART.json by then: its record, whole after every case. The keys are those of `bench.store`, and: complete, failures
[one line each].
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, NamedTuple

import torch
import typer

from bench.machine import ROOT, describe
from bench.measure import one_line
from bench.registry import expression_of, matching
from bench.show import Table, run_table
from bench.store import Content, content_of
from bench.suites import cuda, training
from ddpm import command_line
from ddpm.files import read_json, write_json
from ddpm.runs import held

BUDGET_SECONDS = 500.0  # nine minutes less 40 s to start, to end and for what may overrun
GRACE_SECONDS = 10.0  # for a case that is being measured when a part's time is over
CELL = 60
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"

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
KEPT_LINES = 40


class Record:
    """A part's file while it is being written, by one process at a time. content: what is in it."""

    def __init__(self, out: Path, part: str) -> None:
        self.out, self.part, self.path = out, part, out / f"{part}.json"
        self.content: Content = {}

    def start(self, device: torch.device, pattern: str = "") -> "Record":
        """Begin a file that says it is not complete."""
        asked = {"suite": self.part, "quick": False, "filter": pattern, "processes": 1, "product_flops_per_s": None}
        self.content = content_of([], describe(device), {}, **asked)
        self.keep(complete=False, failures=[])
        return self

    def read(self) -> "Record":
        """Take over what another process wrote."""
        self.content = read_json(self.path)
        return self

    def keep(self, *records: dict[str, Any], **facts: Any) -> None:
        """Add records, set other keys, and replace the file."""
        self.content |= facts
        self.content["records"] += records
        self.content["parity"] = all(record.get("parity", True) for record in self.content["records"])
        self.content["failed"] = sum("failed" in record for record in self.content["records"])
        write_json(self.path, self.content)

    def skip(self, what: str, reason: str) -> None:
        """Keep, and say, that something was left out."""
        print(f"note: {self.part}: {what} skipped, {reason}", file=sys.stderr)
        self.keep(skipped=self.content["skipped"] | {what: reason})

    def fail(self, line: str) -> None:
        """Keep why the part failed."""
        self.keep(failures=[*self.content["failures"], line])


def verdict(content: Content) -> tuple[str, str]:
    """(PASSED, SKIPPED or FAILED, why). Fails closed: what did not reach its end has failed."""
    lost = sum(not record.get("parity", True) for record in content["records"])
    reasons = list(content["failures"])
    reasons += [f"{content['failed']} records failed"] if content["failed"] else []
    reasons += [f"{lost} records lost parity"] if lost else []
    if reasons or not content["complete"]:
        return FAILED, "; ".join(reasons) or "did not reach its end"
    skipped = "; ".join(f"{what}: {reason}" for what, reason in content["skipped"].items())
    return (PASSED if content["records"] else SKIPPED), skipped


class Finished(NamedTuple):
    """code: the exit code, None if it was stopped when its time was over. lines: of stdout and stderr, none empty."""

    code: int | None
    seconds: float
    lines: list[str]

    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return ": ".join((f"exit code {self.code}", *(line.strip() for line in self.lines[-1:])))


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Run in the repository and in a process group of its own, which is killed at the end: no worker is left behind.

    environment: variables beside this process's own.
    """
    began = time.monotonic()
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        how = {"cwd": ROOT, "env": os.environ | (environment or {}), "stdin": subprocess.DEVNULL, "process_group": 0}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)  # noqa: S603
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return Finished(code, round(time.monotonic() - began, 1), [line.rstrip() for line in log if line.strip()])


def tests(record: Record, seconds: float, which: Sequence[str] | None = None) -> None:  # noqa: PT028 (no test)
    """pytest on `which` (paths and options; default those above); one that skips everything has failed."""
    if which is None:
        which = [*PATHS, *(f"--ignore={path}" for path in ELSEWHERE)]
        if all(map(find_spec, ONNX_NEEDS)):
            which.append(ONNX)
        else:
            record.skip(ONNX, f"needs {', '.join(ONNX_NEEDS)}")
    workers = ["-n", str(WORKERS), "--dist", "worksteal"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", "--durations=10"]
    # One thread each, as in `make test`: so many workers share the cores.
    done = run([*command, *workers, *which], seconds, {"OMP_NUM_THREADS": "1"})
    lines = done.lines[-KEPT_LINES:]
    record.keep(
        {"run": "pytest", "exit": done.code, "seconds": done.seconds, "summary": done.ending(), "output": lines}
    )
    if done.code != 0 or not re.search(r"\d+ passed", done.ending()):
        print(*lines, sep="\n", file=sys.stderr)
        record.fail(done.ending())
    record.keep(complete=True)


def in_child(record: Record, seconds: float) -> None:
    """`bench.gpu.measured` for a part; a process that died is a failure in its record. --debug shows its output."""
    command = (sys.executable, "-m", "bench.gpu.measured", record.part, str(record.out), str(time.time() + seconds))
    done = run(command, seconds + GRACE_SECONDS)
    if command_line.debugging():
        print(*done.lines, sep="\n", file=sys.stderr)
    record.read()
    if done.code != 0:
        record.keep(output=done.lines[-KEPT_LINES:])
        record.fail(f"its process: {done.ending()}")


# Part -> (its seconds of BUDGET_SECONDS, untuned; what finds out so much and keeps it in the record).
PARTS: dict[str, tuple[float, Callable[[Record, float], None]]] = {"tests": (120, tests)}
PARTS |= {"kernels": (95, in_child), "step": (125, in_child), "training": (110, in_child), "profile": (50, in_child)}


def run_parts(out: Path, names: Sequence[str], budget: float, device: torch.device, pattern: str = "") -> int:
    """Run these parts, print their tables and a line each. Returns the exit code."""
    until, share = time.monotonic(), budget / sum(PARTS[name][0] for name in names)
    # All at once, so that nothing of an earlier run is taken for this one's.
    records = {name: Record(out, name).start(device, pattern) for name in names}
    for name, record in records.items():
        seconds, run = PARTS[name]
        until += seconds * share
        left = until - time.monotonic()
        if left <= 0:
            record.fail("out of time before it began")
            continue
        print(f"{name}: at most {left:.0f} s", file=sys.stderr, flush=True)
        try:
            run(record, left)
        except Exception as error:  # the other parts are run all the same
            record.fail(one_line(error))
    for record in records.values():
        show(record.content)
    code = 0
    for name, record in records.items():
        status, why = verdict(record.content)
        print(f"{name:10s} {status:8s} {why}")
        if status == FAILED:
            code = command_line.FAILED
            print(f"error: {name}: {why}", file=sys.stderr)
    print(f"wrote {out}")
    return code


def show(content: Content) -> None:
    """A part's records as a table: of workloads that of `run`, of programs and kernels what is in them."""
    records = content["records"]
    if any("candidate" in record for record in records):
        table, wrong = run_table(content)
        table.show(wrong, "red bold")
        return
    keys = list(dict.fromkeys(key for record in records for key in record if key != "output"))
    cells = [[record.get(key, "") for key in keys] for record in records]
    rows = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell)[:CELL] for cell in row] for row in cells]
    Table(keys, "l" * len(keys), rows, content["suite"]).show()


def gpu(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    parts: Annotated[str, typer.Option(metavar="A,B", help=f"which of {', '.join(PARTS)}")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(min=0, help="seconds for all of them")] = BUDGET_SECONDS,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="workloads of step and training")] = "",
) -> int:
    """Everything that only a GPU can tell: tests and times, in under nine minutes."""
    asked = parts.split(",")
    for name in asked:
        if name not in PARTS:
            raise typer.BadParameter(f"got {name!r}, needs some of {', '.join(PARTS)}", param_hint="--parts")
    expression = expression_of(pattern)
    if pattern:
        found = cuda.workloads(False, torch.device("cuda")) if "step" in asked else []
        matching(found + (training.cuda_workloads(training.BATCHES[-1]) if "training" in asked else []), expression)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device, needs one", param_hint="gpu")
    out = out.resolve()
    with held(out):
        return run_parts(out, [name for name in PARTS if name in asked], budget, torch.device("cuda"), pattern)
