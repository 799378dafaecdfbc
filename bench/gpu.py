"""`make gpu`: everything that only a GPU can tell, in one command of under nine minutes.

First the kernel tests on the device, then every kernel's time against its eager sequence and a copy of the same bytes.
Records are written after each size, so that a run that is cut short keeps what it measured.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.kernels import SEED, measure, workloads
from bench.machine import ROOT, describe
from ddpm.files import write_json
from ddpm.progress import Bar

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 30
TEST_SECONDS = 300.0
BUDGET_SECONDS = 500.0  # for tests and times together; nine minutes leave 40 s to start and to end


def run_tests(limit: float = TEST_SECONDS) -> dict[str, Any]:
    """The kernel tests in a process of their own (an illegal access would spoil this one): exit code and seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
    began = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode  # noqa: S603
    except subprocess.TimeoutExpired:
        print(f"kernel tests: stopped after {limit:.0f} s", file=sys.stderr)
        code = None
    return {"exit": code, "seconds": round(time.monotonic() - began, 1)}


def run_kernels(
    out: Path,
    device: torch.device,
    sizes: Sequence[int] = SIZES,
    types: Sequence[torch.dtype] = TYPES,
    rounds: int = ROUNDS,
    budget: float = BUDGET_SECONDS,
    tests: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every operator at every size and type into out/kernels.json, and return its content.

    The file is written at the start and after every case, so that it never tells of an earlier run. Stops when
    `budget` seconds are over, says so, and leaves "complete" false.
    """
    began = time.monotonic()
    cases = [(size, dtype) for size in sizes for dtype in types]
    content = {
        "machine": describe(device),
        "command": " ".join(("ddpm-bench", *sys.argv[1:])),
        "seed": SEED,
        "tests": tests,
        "complete": False,
        "records": [],
    }
    with ExitStack() as finish:
        finish.callback(write_json, out / "kernels.json", content)
        write_json(out / "kernels.json", content)
        bar = finish.enter_context(Bar("kernels", len(cases), "cases/s"))
        for done, (size, dtype) in enumerate(cases, start=1):
            for workload in workloads(size, dtype, device):
                if time.monotonic() - began > budget:
                    print(f"stopped in case {done} of {len(cases)}: {budget:.0f} s are over", file=sys.stderr)
                    return content
                content["records"].append(measure(workload, device, rounds))
            content["complete"] = done == len(cases)
            write_json(out / "kernels.json", content)
            bar.update(done)
    return content


def table(records: Sequence[dict]) -> str:
    """The records as lines: time, bandwidth, share of a copy, ratio to eager; or the parity that failed."""
    lines = [f"{'kernel':20s} {'type':9s} {'elements':>11s} {'us':>9s} {'GB/s':>7s} {'of copy':>8s} {'x eager':>8s}"]
    for record in records:
        head = f"{record['kernel']:20s} {record['dtype']:9s} {record['elements']:11,d} "
        if not record["parity"]:
            lines.append(f"{head}parity failed: {record['error']:.2g} > {record['tolerance']:.2g}, no ratio")
            continue
        lines.append(
            f"{head}{record['kernel_us']['median']:9.2f} {record['gb_per_s']:7.0f} "
            f"{record['share_of_copy']:8.0%} {record['ratio_to_eager']:8.2f}{'' if record['cold'] else '  in cache'}"
        )
    return "\n".join(lines)
