"""What a part leaves behind, other programs run for a limited time, and pytest for part `tests`.

A record is OUT/PART.json, whole after every case, so that nothing that was measured is lost. Its keys are those of
`bench.store`, and: complete, failures [one line each].
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from bench.machine import ROOT, describe
from bench.store import Content, content_of
from ddpm.files import read_json, write_json

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
