"""Part `profile`: where a step's time goes on the device: torch.profiler's kernels and trace, and ncu's counters.

OUT/profile.json has the kernels of a step and the counters, OUT/trace.json.gz is for Perfetto, OUT/ncu.csv is what ncu
printed.
"""

import csv
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu import process
from bench.gpu.record import Content, Record
from bench.gpu.sanitizer import located, refusal
from bench.profiling.trace import KERNELS, RANGE, slim, union
from bench.suites import cuda
from bench.timing import synchronize
from ddpm.files import replacing, write_text

TRACE, COUNTERS = "trace.json.gz", "ncu.csv"
BATCHES = (1, 64)
ENGINES, TYPE = ("graph", cuda.KERNELS), torch.bfloat16
WARM_UP, STEPS = 2, 10
NAME_LENGTH, ROWS_SHOWN = 48, 6
ELEMENTS = 10**7  # of ncu's launches: well past a launch's own cost
PROGRAM = (sys.executable, "-m", "bench.gpu.launches", str(ELEMENTS))
NUMBER = re.compile(r"\d+(\.\d+)?")
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}


def kernels_of(trace: Mapping[str, Any], name: str, steps: int) -> dict[str, Any]:
    """What ran on the device during the range `name`: busy_us and wall_us per step, kernels by time.

    The range must end with a synchronisation. share: of the time in which the device was busy.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    (whole,) = (event for event in events if event["name"] == name and event.get("cat") == RANGE)
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    ran = [event for event in events if event.get("cat") in KERNELS and begin <= event["ts"] < end]
    total: dict[str, list[float]] = {}
    for event in ran:
        total.setdefault(event["name"], []).append(event["dur"])
    busy = union([(event["ts"], event["ts"] + event["dur"]) for event in ran])
    rows = [
        {
            "kernel": kernel,
            "calls_per_step": round(len(times) / steps, 3),
            "us_per_step": round(sum(times) / steps, 3),
            "share": round(sum(times) / busy, 4),
        }
        for kernel, times in total.items()
    ]
    return {
        "busy_us": round(busy / steps, 3),
        "wall_us": round(whole["dur"] / steps, 3),
        "kernels": sorted(rows, key=lambda row: -row["us_per_step"]),
    }


def run_trace(
    out: Path,
    device: torch.device,
    seconds: float,
    batches: Sequence[int] = BATCHES,
    engines: Sequence[str] = ENGINES,
    dtype: torch.dtype = TYPE,
) -> Content:
    """Profile a trajectory of each engine at each batch size, into out/profile.json and out/trace.json.gz."""
    record = Record.start(out, "profile", seconds, device, seed=cuda.SEED, dtype=str(dtype).removeprefix("torch."))
    calls: dict[str, Callable[[], Any]] = {}
    for engine in engines:
        for batch in batches:
            name = f"{engine} batch{batch}"
            calls[name] = cuda.trajectory(cuda.Row(name, batch), engine, dtype, device, STEPS)
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for name, call in calls.items():
            with record_function(name):
                call()
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = slim(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    with replacing(out / TRACE) as partial, gzip.open(partial, "wt", encoding="utf-8") as file:
        json.dump(trace, file, separators=(",", ":"))
    for name in calls:
        found = kernels_of(trace, name, STEPS)
        record.add({"workload": name, "steps": STEPS} | found)
        if not found["kernels"]:
            record.fail(f"{name}: no kernel in the trace")
    return record.content


def counters_of(text: str) -> list[dict[str, Any]]:
    """Of ncu's CSV (page raw, base units): a record per launch, {"kernel", ..} with the values of METRICS."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    found = []
    for row in rows:
        if not row["ID"]:  # the line of units
            continue
        cells = [(name, (row[metric] or "").replace(",", "")) for metric, name in METRICS.items()]
        if not all(NUMBER.fullmatch(cell) for _, cell in cells):  # cut off, or a counter that was not available
            continue
        found.append({"kernel": row["Kernel Name"]} | {name: float(cell) for name, cell in cells})
    return found


def run_counters(out: Path, seconds: float, program: Sequence[str] = PROGRAM) -> Content:
    """Add ncu's counters of every operator's launches to out/profile.json, which `run_trace` began, and end it."""
    record = Record.resume(out, "profile")
    ncu = located("ncu")
    if ncu is None:
        record.skip("ncu", "it is not on this machine")
    else:
        _count(record, ncu, out, seconds, program)
    if record.content["records"]:
        record.finish()
    return record.content


def _count(record: Record, ncu: str, out: Path, seconds: float, program: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        # The program says which launches count; clocks are left as they are.
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
        command += ["--print-units", "base", "--metrics", ",".join(METRICS), "--log-file", str(log)]
        command += ["--target-processes", "application-only"]
        done = process.run([*command, *program], seconds)
        text = log.read_text(errors="replace") if log.exists() else ""
    refused = refusal(text + done.output)
    if refused is not None:
        record.skip("ncu", refused)
        return
    write_text(out / COUNTERS, "\n".join(line for line in text.splitlines() if line.startswith('"')) + "\n")
    record.content["counters"] = counters_of(text)
    if done.code != 0 or not record.content["counters"]:
        record.fail(f"ncu: {done.ending()}")
    record.write()


def run_profile(out: Path, device: torch.device, seconds: float, trace: Callable[[float], None]) -> None:
    """Both: `trace(seconds)` runs `run_trace` in a process of its own, ncu gets the rest."""
    until = monotonic() + seconds
    for name in (TRACE, COUNTERS):
        (out / name).unlink(missing_ok=True)
    trace(seconds / 2)
    run_counters(out, until - monotonic())


def table(content: Content) -> str:
    """The kernels of a step that take longest, then a line of counters for each Triton kernel."""
    lines = []
    for record in content["records"]:
        count = sum(row["calls_per_step"] for row in record["kernels"])
        lines.append(
            f"{record['workload']} {content['dtype']}: a step {record['wall_us']:.1f} us under the "
            f"profiler, the device busy for {record['busy_us']:.1f} us, {count:g} kernels"
        )
        for row in record["kernels"][:ROWS_SHOWN]:
            name, calls = row["kernel"][:NAME_LENGTH], row["calls_per_step"]
            lines.append(f"  {name:{NAME_LENGTH}s} {calls:6.1f} {row['us_per_step']:8.2f} us {row['share']:5.0%}")
    counted = content.get("counters", [])
    if counted:
        lines.append(f"ncu, {ELEMENTS:.0e} elements: kernel, us, GB/s of DRAM, issue slots busy, occupancy, registers")
    for row in counted:
        moved = row["dram_bytes_read"] + row["dram_bytes_written"]
        lines.append(
            f"  {row['kernel'][:NAME_LENGTH]:{NAME_LENGTH}s} {row['ns'] / 1e3:8.1f} {moved / row['ns']:6.0f} "
            f"{row['issue_percent']:4.0f}% {row['occupancy_percent']:4.0f}% {row['registers']:4.0f}"
        )
    return "\n".join(lines)
