"""Part `sanitizer`: compute-sanitizer's memcheck and racecheck around every operator.

First the program alone, which compiles the kernels and shows that it runs; then the tools, and beside them a launch
that writes out of bounds on purpose, since a checker that cannot see Triton's kernels finds no errors either.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import torch

from bench.gpu import process
from bench.gpu.record import Content, Record
from bench.kernels import SEED

RUNS = (("memcheck", True), ("memcheck", False), ("racecheck", False))  # tool, whether with the planted error
# 86: of the tool when it found something, and no other program's.
# API calls that fail are no errors of kernels: libraries probe for entry points that a driver lacks.
OPTIONS = ("--error-exitcode", "86", "--target-processes", "application-only", "--report-api-errors", "no")
PLANTED = "Invalid __global__ write"
SHARDS = 8  # processes that compile the kernels, into Triton's cache, where the tools' runs find them
PROGRAM = (sys.executable, "-m", "bench.gpu.launches")
# Every allocation a cudaMalloc of its own: PyTorch's cache would hide accesses beyond a tensor.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# What NVIDIA's tools say where they are installed and the machine does not let them work (gVisor, no permission).
REFUSALS = ("Device not supported", "Failed to initialize", "LibraryNotLoaded", "ERR_NVGPUCTRPERM")


def located(tool: str) -> str | None:
    """Where a tool of the CUDA toolkit lies, None if nowhere."""
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def refusal(output: str) -> str | None:
    """The line in which a tool says that it cannot work on this machine."""
    lines = (line for line in output.splitlines() if line.startswith("=="))
    return next((line.strip("= ") for line in lines if any(words in line for words in REFUSALS)), None)


def errors_in(output: str) -> int | None:
    """Of the last summary line; None without one."""
    found = SUMMARY.findall(output)
    return int(found[-1]) if found else None


def run_sanitizer(out: Path, device: torch.device, seconds: float, program: Sequence[str] = PROGRAM) -> Content:
    """Run the program alone, then under all tools at a time, into out/sanitizer.json."""
    until = monotonic() + seconds
    record = Record.start(out, "sanitizer", seconds, device, seed=SEED)
    tool = located("compute-sanitizer")
    if tool is None:
        record.skip("compute-sanitizer", "it is not on this machine")
        record.finish()
        return record.content

    def run(command: Sequence[str]) -> process.Finished:
        return process.run(command, until - monotonic(), ENVIRONMENT)

    with ThreadPoolExecutor() as pool:
        alone = list(pool.map(run, ([*program, "shard", str(k), str(SHARDS)] for k in range(SHARDS))))
        record.content["alone"] = [
            {"exit": done.code, "seconds": done.seconds, "last_line": done.tail(1)} for done in alone
        ]
        record.write()
        bad = next((done for done in alone if done.code != 0), None)
        if bad is not None:
            record.content["output"] = bad.tail(40)
            record.fail(f"the program alone: {bad.ending()}")
            return record.content
        commands = [
            [tool, "--tool", name, *OPTIONS, *program, *(["planted"] if planted else [])] for name, planted in RUNS
        ]
        for (name, planted), done in zip(RUNS, pool.map(run, commands), strict=True):
            _judge(record, f"{name} planted" if planted else name, planted, done)
    record.finish()
    return record.content


def _judge(record: Record, name: str, planted: bool, done: process.Finished) -> None:
    """Keep a tool's run, and whether it found what it should: something if an error was planted, else nothing."""
    refused, errors = refusal(done.output), errors_in(done.output)
    if refused is not None:
        record.skip(name, f"compute-sanitizer: {refused}")
        return
    record.add({"tool": name, "exit": done.code, "seconds": done.seconds, "errors": errors, "output": done.tail(40)})
    if planted:
        if done.code is None or not errors or PLANTED not in done.output:
            record.fail(f"{name}: found no error where one was planted ({done.ending()})")
    elif done.code != 0 or errors != 0:
        record.fail(f"{name}: {f'{errors} errors' if errors else done.ending()}")


def table(content: Content) -> str:
    """A line per run."""
    return "\n".join(
        f"{run['tool']:18s} exit {run['exit']}, {run['errors']} errors, {run['seconds']:.0f} s"
        for run in content["records"]
    )
