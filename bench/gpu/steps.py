"""Parts `step` and `training`: whole steps, ours beside eager and torch.compile(mode="max-autotune"), parity first.

The files are those of `ddpm-bench run`. What there was no time for is under "skipped".
"""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench.gpu.record import Content, Record
from bench.kernels import full_precision
from bench.measure import matrix_ceiling, measure
from bench.registry import Bench, Workload
from bench.show import microseconds
from bench.store import is_good
from bench.suites import cuda, training
from bench.suites.networks import SIDE, TIMESTEPS
from bench.timing import Call, summary, timer

ROUNDS, SECONDS = 20, 4.0  # of one workload, whichever ends first; three rounds are done in any case
RESERVE_SECONDS = 10.0  # kept for the rounds of what is built; untuned
# Seconds to build a candidate, compiling included, before one was measured; untuned.
BUILD_SECONDS = {"max-autotune": 90.0, "compile": 40.0, "graph": 8.0, "kernels": 20.0, "fused": 8.0, "eager": 2.0}
TRAINING_BUILD_SECONDS = {"max-autotune": 100.0, "compile": 45.0, "graph": 45.0, "eager": 3.0}
OUT_OF_TIME = "not measured: out of time"
TRAJECTORIES = [(engine, label) for engine in ("graph", cuda.KERNELS) for label in ("bf16", "fp16")]
TRAJECTORY_ROUNDS = 5
PEERS = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}


class OutOfTime(Exception):
    """A candidate that is not begun."""


class Clock:
    """What is left of a part's seconds, and what building a kind of candidate (the first word of its name) takes."""

    def __init__(self, seconds: float, builds: Mapping[str, float] = BUILD_SECONDS) -> None:
        self.until = monotonic() + seconds
        self.builds = dict(builds)

    def has(self, candidate: str) -> bool:
        """Whether there is time to build and measure it."""
        return monotonic() + self.builds.get(candidate.split()[0], 0.0) + RESERVE_SECONDS < self.until

    def learn(self, records: Sequence[dict[str, Any]]) -> None:
        """Take over what building took; the next one of a kind may need as long."""
        for record in records:
            if "warm_up_s" in record:
                self.builds[record["candidate"].split()[0]] = record["warm_up_s"]

    def limited(self, bench: Bench) -> Bench:
        """The same, whose candidates refuse to be built when there is no time for them."""

        def guarded(name: str) -> Callable[[], Call]:
            def make() -> Call:
                if not self.has(name):
                    raise OutOfTime(OUT_OF_TIME)
                return bench.candidates[name].make()

            return make

        guards = {name: replace(candidate, make=guarded(name)) for name, candidate in bench.candidates.items()}
        return replace(bench, candidates=guards)


def _measure(record: Record, workload: Workload, device: torch.device, clock: Clock) -> None:
    """Measure what of a workload there is time for, TF32 off; it is on the disk when the next begins."""
    if not clock.has("eager"):
        record.skip(workload.name, OUT_OF_TIME)
        return
    # Compiled code and captures of the workload before hold memory, and torch.compile counts its graphs.
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    limited = replace(workload, build=lambda there: clock.limited(workload.build(there)))
    with full_precision():
        found = measure(limited, device, ROUNDS, SECONDS, record.content["product_flops_per_s"])
    clock.learn(found)
    for line in found:
        if line.get("failed", "").startswith(OutOfTime.__name__):
            record.skip(f"{line['workload']} {line['candidate']}", OUT_OF_TIME)
        else:
            record.add({"process": 0} | line)


def workloads(parts: Sequence[str], device: torch.device) -> list[Workload]:
    """Of those parts that take a filter."""
    found = cuda.workloads(False, device) if "step" in parts else []
    return found + (training.cuda_workloads(training.BATCHES[-1]) if "training" in parts else [])


def _finish(record: Record) -> None:
    left_out = sum(reason == OUT_OF_TIME for reason in record.content["skipped"].values())
    if left_out:
        record.fail(f"out of time: {left_out} workloads or candidates not measured")
    else:
        record.finish()


def _trajectories(record: Record, rows: Sequence[cuda.Row], device: torch.device, clock: Clock) -> None:
    """Whole trajectories of T steps: wall time in milliseconds, by row, engine and type.

    Only of those that have parity in fewer steps.
    """
    good = {f"cuda/{r['workload'].split('/')[1]} {r['candidate']}" for r in record.content["records"] if is_good(r)}
    for row in rows:
        for engine, label in TRAJECTORIES:
            name = f"cuda/{row.name} {engine} {label}"
            if name not in good:
                continue
            if not clock.has(engine):
                record.skip(f"{name}, {TIMESTEPS} steps", OUT_OF_TIME)
                continue
            call = cuda.trajectory(row, engine, cuda.TYPES[label], device, TIMESTEPS)
            once = timer(call, [()], device)
            once()
            samples = [once().wall / 1e3 for _ in range(TRAJECTORY_ROUNDS)]
            record.content["trajectories"][name] = {"steps": TIMESTEPS, "wall_ms": summary(samples)}
            record.write()


def _peers(record: Record) -> None:
    """Other libraries' loops have a command of their own."""
    for name, package in PEERS.items():
        if find_spec(package) is None:
            record.skip(name, "it is not installed here")
        else:
            record.skip(name, "measured by `ddpm-bench peers`")


def run_step(
    out: Path,
    device: torch.device,
    seconds: float,
    pattern: str = "",
    rows: Sequence[cuda.Row] = cuda.ROWS,
) -> Content:
    """The workloads of suite `cuda` whose name matches, into out/step.json.

    First our engines on all rows, then their whole trajectories, then max-autotune.
    """
    clock = Clock(seconds)
    record = Record.start(out, "step", seconds, device, pattern, seed=cuda.SEED, tf32=False, trajectories={})
    record.content["product_flops_per_s"] = matrix_ceiling(device)
    _peers(record)
    found = [w for w in cuda.workloads(False, device, rows) if re.search(pattern, w.name)]
    quick = [w for w in found if w.name.endswith("/engines")]
    for workload in quick:
        _measure(record, workload, device, clock)
    _trajectories(record, [row for row in rows if row.side == SIDE], device, clock)
    for workload in found:
        if workload not in quick:
            _measure(record, workload, device, clock)
    _finish(record)
    return record.content


def run_training(
    out: Path, device: torch.device, seconds: float, pattern: str = "", batch: int = training.BATCHES[-1]
) -> Content:
    """Training steps whose name matches, into out/training.json."""
    clock = Clock(seconds, TRAINING_BUILD_SECONDS)
    record = Record.start(out, "training", seconds, device, pattern, seed=training.SEED, tf32=False)
    record.content["product_flops_per_s"] = matrix_ceiling(device)
    for workload in training.cuda_workloads(batch):
        if re.search(pattern, workload.name):
            _measure(record, workload, device, clock)
    _finish(record)
    return record.content


def table(content: Content) -> str:
    """A line per competitor: time of a step, ratio to eager in float32, share of the matrix rate, parity error."""
    lines = [f"{'a step, TF32 off':52s} {'time':>9s} {'x eager':>8s} {'of mm':>6s} {'error':>8s}"]
    for record in content["records"]:
        name = f"{record['workload']} {record['candidate']}"
        if not is_good(record):
            lost = record.get("failed") or f"parity lost: {record['error']} > {record['tolerance']}"
            lines.append(f"{name:52s} {lost[:100]}")
            continue
        ratio = "" if record["speed_up"] is None else f"{record['speed_up']:.2f}"
        error = f"{record['error']:.1e}" if "error" in record else ""
        time = microseconds(record["kernel_us"])
        lines.append(f"{name:52s} {time:>9s} {ratio:>8s} {record['share_of_product']:6.1%} {error:>8s}")
    for name, run in content.get("trajectories", {}).items():
        lines.append(f"{name}, {run['steps']} steps: {run['wall_ms']['median']:.1f} ms")
    left_out = [what for what, reason in content["skipped"].items() if reason == OUT_OF_TIME]
    if left_out:
        lines.append(f"not measured, out of time: {', '.join(left_out)}")
    return "\n".join(lines)
