"""`ddpm-bench gpu`: its parts in order, each within its share of the time, each in a process that it cannot spoil.

A part begins with what the parts before it left over, and is stopped when its time is over; what it measured is in
OUT/PART.json by then. No more than eight files: what brings them back from a lent machine takes no more.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.goals import GPU_HEADINGS, gpu_cells
from bench.gpu import kernels, process, profile, sanitizer, steps, tests
from bench.gpu.record import FAILED as PART_FAILED
from bench.gpu.record import Content, Record, verdict
from bench.measure import one_line
from bench.registry import expression_of, matching
from ddpm.command_line import FAILED, debugging
from ddpm.files import read_json

BUDGET_SECONDS = 500.0  # nine minutes less 40 s to start, to end and for what may overrun
GRACE_SECONDS = 10.0  # for a case that is being measured when a part's time is over

# What a part does: (folder, device, seconds, filter).
Run = Callable[[Path, torch.device, float, str], object]


@dataclass(frozen=True)
class Part:
    """share: of the whole budget, beside the other parts'. run: writes OUT/PART.json. table: its content as lines."""

    share: float
    run: Run
    table: Callable[[Content], str]


def in_child(part: str, out: Path, seconds: float, pattern: str = "") -> None:
    """`python -m bench.gpu` for a part that measures here; a process that died is a failure in its record.

    Under --debug its output is shown, with the tracebacks of what failed in it.
    """
    until = time.time() + seconds
    command = [sys.executable, "-m", "bench.gpu", part, str(out), str(until), pattern]
    done = process.run(command, seconds + GRACE_SECONDS)
    if debugging():
        sys.stderr.write(done.output)
    if done.code != 0:
        record = Record.resume(out, part)
        record.content["output"] = done.tail(40)
        record.fail(f"its process: {done.ending()}")


def _measured(part: str) -> Run:
    return lambda out, device, seconds, pattern: in_child(part, out, seconds, pattern)


def _profile(out: Path, device: torch.device, seconds: float, pattern: str) -> None:
    profile.run_profile(out, device, seconds, lambda some: in_child("profile", out, some))


# Shares are seconds of 500; untuned.
PARTS = {
    "tests": Part(120, lambda out, device, seconds, _: tests.run_tests(out, device, seconds), tests.table),
    "sanitizer": Part(50, lambda out, device, s, _: sanitizer.run_sanitizer(out, device, s), sanitizer.table),
    "kernels": Part(85, _measured("kernels"), kernels.table),
    "step": Part(125, _measured("step"), steps.table),
    "training": Part(80, _measured("training"), steps.table),
    "profile": Part(40, _profile, profile.table),
}
# What runs in the processes of `in_child`.
CHILDREN: dict[str, Run] = {
    "kernels": lambda out, device, seconds, _: kernels.run_kernels(out, device, seconds),
    "step": lambda out, device, seconds, pattern: steps.run_step(out, device, seconds, pattern),
    "training": lambda out, device, seconds, pattern: steps.run_training(out, device, seconds, pattern),
    "profile": lambda out, device, seconds, _: profile.run_trace(out, device, seconds),
}


def run_parts(out: Path, names: list[str], budget: float, device: torch.device, pattern: str = "") -> int:
    """Run these parts, print their tables, a line each, and the goals. Returns the exit code."""
    began, shares = time.monotonic(), 0.0
    whole = sum(PARTS[name].share for name in names)
    for name in names:  # so that nothing of an earlier run is taken for this one's
        Record.start(out, name, 0.0, device, pattern)
    for name in names:
        shares += PARTS[name].share
        left = began + budget * shares / whole - time.monotonic()
        if left <= 0:
            Record.resume(out, name).fail("out of time before it began")
            continue
        print(f"{name}: at most {left:.0f} s", file=sys.stderr, flush=True)
        try:
            PARTS[name].run(out, device, left, pattern)
        except Exception as error:  # the other parts are run all the same
            Record.resume(out, name).fail(one_line(error))
    contents = {name: read_json(out / f"{name}.json") for name in names}
    for name, content in contents.items():
        print(f"\n== {name}\n{PARTS[name].table(content)}")
    code = 0
    print("\n== parts")
    for name, content in contents.items():
        status, why = verdict(content)
        print(f"{name:10s} {status:8s} {why}")
        if status == PART_FAILED:
            code = FAILED
            print(f"error: {name}: {why}", file=sys.stderr)
    print(f"{goals_table(contents)}wrote {out}")
    return code


def goals_table(contents: dict[str, Content]) -> str:
    """The goals beside what parts `step` and `training` measured; nothing without them."""
    measured = [content for name, content in contents.items() if name in ("step", "training")]
    if not measured:
        return ""
    records = [record for content in measured for record in content["records"]]
    trajectories = contents.get("step", {}).get("trajectories", {})
    cells = [list(GPU_HEADINGS), *gpu_cells(records, trajectories)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(GPU_HEADINGS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(("\n== goals", *lines, ""))


def gpu(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    parts: Annotated[str, typer.Option(metavar="A,B", help=f"which of {', '.join(PARTS)}")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(min=0, help="seconds for all of them")] = BUDGET_SECONDS,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="workloads of step and training")] = "",
) -> int:
    """Everything that only a GPU can tell: tests, memory errors, times and goals, in under nine minutes."""
    asked = parts.split(",")
    for name in asked:
        if name not in PARTS:
            raise typer.BadParameter(f"got {name!r}, needs some of {', '.join(PARTS)}", param_hint="--parts")
    expression = expression_of(pattern)
    if pattern:
        matching(steps.workloads(asked, torch.device("cuda")), expression)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device, needs one", param_hint="gpu")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return run_parts(out, [name for name in PARTS if name in asked], budget, torch.device("cuda"), pattern)
