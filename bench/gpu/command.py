"""`ddpm-bench gpu`: its parts in order, each within its share of the time, each in processes that it cannot spoil.

A part begins with what the parts before it left over, and is stopped when its time is over; what it measured is in
OUT/PART.json by then.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu import tools
from bench.gpu.tools import Record
from bench.measure import one_line
from bench.registry import expression_of, matching
from bench.show import Table, run_table
from bench.store import Content
from bench.suites import cuda, training
from ddpm.command_line import FAILED, debugging

BUDGET_SECONDS = 500.0  # nine minutes less 40 s to start, to end and for what may overrun
GRACE_SECONDS = 10.0  # for a case that is being measured when a part's time is over
CELL = 60


def in_child(record: Record, seconds: float) -> None:
    """`bench.gpu.measured` for a part; a process that died is a failure in its record.

    Under --debug its output is shown, with the tracebacks of what failed in it.
    """
    command = (sys.executable, "-m", "bench.gpu.measured", record.part, str(record.out), str(time.time() + seconds))
    done = tools.run(command, seconds + GRACE_SECONDS)
    if debugging():
        print(*done.lines, sep="\n", file=sys.stderr)
    record.read()
    if done.code != 0:
        record.keep(output=done.lines[-tools.KEPT_LINES :])
        record.fail(f"its process: {done.ending()}")


# Part -> (its seconds of BUDGET_SECONDS, untuned; what finds out so much and keeps it in the record).
PARTS: dict[str, tuple[float, Callable[[Record, float], None]]] = {
    "tests": (120, tools.tests),
    "kernels": (95, in_child),
    "step": (125, in_child),
    "training": (110, in_child),
    "profile": (50, in_child),
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
    for record in records.values():
        show(record.content)
    code = 0
    for name, record in records.items():
        status, why = tools.verdict(record.content)
        print(f"{name:10s} {status:8s} {why}")
        if status == tools.FAILED:
            code = FAILED
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
    out.mkdir(parents=True, exist_ok=True)
    return run_parts(out, [name for name in PARTS if name in asked], budget, torch.device("cuda"), pattern)
