"""`ddpm-bench gpu`: its parts in order, each within its share of the time, each in processes that it cannot spoil.

A part begins with what the parts before it left over, and is stopped when its time is over; what it measured is in
OUT/PART.json by then.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.gpu import process, tools
from bench.gpu.record import FAILED as PART_FAILED
from bench.gpu.record import Record, verdict
from bench.measure import EAGER, one_line
from bench.registry import Workload, expression_of, matching
from bench.suites import cuda, training
from ddpm.command_line import FAILED, debugging

BUDGET_SECONDS = 500.0  # nine minutes less 40 s to start, to end and for what may overrun
GRACE_SECONDS = 10.0  # for a case that is being measured when a part's time is over
# What is shown of a record, and how: those columns that have values.
COLUMNS = {"run": "", "exit": "", "seconds": ".0f", "summary": "", "workload": "", "candidate": "", "kernel": ""}
COLUMNS |= {"calls": ".1f", "us": ".2f", "kernel_us": ".1f", "wall_us": ".1f", "speed_up": ".2f", "error": ".1e"}
COLUMNS |= {"share_of_product": ".1%", "share_of_bound": ".0%", "prediction_error": "+.0%", "gb_per_s": ".0f"}
COLUMNS |= {"issue_percent": ".0f", "occupancy_percent": ".0f", "registers": ".0f", "parity": "", "failed": ""}
CELL = 60


def in_child(record: Record, seconds: float) -> None:
    """`bench.gpu.measured` for a part; a process that died is a failure in its record.

    Under --debug its output is shown, with the tracebacks of what failed in it.
    """
    command = (sys.executable, "-m", "bench.gpu.measured", record.part, str(record.out), str(time.time() + seconds))
    done = process.run(command, seconds + GRACE_SECONDS)
    if debugging():
        sys.stderr.write(done.output)
    record.read()
    if done.code != 0:
        record.keep(output=done.tail(40))
        record.fail(f"its process: {done.ending()}")


def profile(record: Record, seconds: float) -> None:
    """The kernels of a step, and with the rest of the time ncu's counters."""
    until = time.monotonic() + seconds
    in_child(record, seconds / 2)
    tools.counters(record, until - time.monotonic())
    record.keep(complete=bool(record.content["records"]))


# Part -> (its seconds of BUDGET_SECONDS, untuned; what finds out so much and keeps it in the record).
PARTS: dict[str, tuple[float, Callable[[Record, float], None]]] = {
    "tests": (120, tools.tests),
    "sanitizer": (50, tools.sanitizer),
    "kernels": (85, in_child),
    "step": (125, in_child),
    "training": (80, in_child),
    "profile": (40, profile),
}


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
    for name, record in records.items():
        print(f"\n== {name}\n{table(record.content['records'])}")
    code = 0
    print("\n== parts")
    for name, record in records.items():
        status, why = verdict(record.content)
        print(f"{name:10s} {status:8s} {why}")
        if status == PART_FAILED:
            code = FAILED
            print(f"error: {name}: {why}", file=sys.stderr)
    print(f"wrote {out}")
    return code


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line per record, but not of the eager sequences of kernels, of which each operator has the ratio."""

    def cell(record: Mapping[str, Any], key: str) -> str:
        value = record.get(key)
        value = "" if value is None else value
        return value[:CELL] if isinstance(value, str) else format(value, COLUMNS[key])

    shown = [r for r in records if r.get("suite") != "kernels" or r["candidate"] != EAGER or "failed" in r]
    keys = [key for key in COLUMNS if any(key in record for record in shown)]
    rows = [keys, *([cell(record, key) for key in keys] for record in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((*lines, *(line for record in shown for line in record.get("lines", []))))


def _workloads(parts: Sequence[str]) -> list[Workload]:
    """Of those parts that take a filter."""
    found = cuda.workloads(False, torch.device("cuda")) if "step" in parts else []
    return found + (training.cuda_workloads(training.BATCHES[-1]) if "training" in parts else [])


def gpu(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    parts: Annotated[str, typer.Option(metavar="A,B", help=f"which of {', '.join(PARTS)}")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(min=0, help="seconds for all of them")] = BUDGET_SECONDS,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="workloads of step and training")] = "",
) -> int:
    """Everything that only a GPU can tell: tests, memory errors and times, in under nine minutes."""
    asked = parts.split(",")
    for name in asked:
        if name not in PARTS:
            raise typer.BadParameter(f"got {name!r}, needs some of {', '.join(PARTS)}", param_hint="--parts")
    expression = expression_of(pattern)
    if pattern:
        matching(_workloads(asked), expression)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device, needs one", param_hint="gpu")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return run_parts(out, [name for name in PARTS if name in asked], budget, torch.device("cuda"), pattern)
