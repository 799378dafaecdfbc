"""Measuring a sampler: step latencies without the profiler, then a few steps with it."""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.profiling import trace as traces
from bench.profiling.ranges import GAPS, OTHER, PARTS, STEP, WARM_UP, RangedNoise, module_ranges
from bench.timing import synchronize
from ddpm.errors import WorkFailed
from ddpm.inference import device_of, kept_form
from ddpm.networks import sample_shape
from ddpm.noise import Noise, PhiloxNoise
from ddpm.progress import Bar
from ddpm.schedule import NoiseSchedule
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory
from kernels.philox import Stream

# Steps before anything is timed, and steps that the profiler sees: five keep trace.json below 5 MB.
WARM_UP_STEPS, PROFILED_STEPS = 5, 5
UNPROFILED_STEPS = 2  # at the start of the profiled trajectory
KNOWN_WARNING = b"Memory block of unknown size was allocated before the profiling started"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class _Enough(Exception):
    """Leaves an engine's trajectory early: raised by a callback, caught here."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """A trajectory with the arguments of a call: x_T [n, *shape], context [n, ...] or None.

    named: what is called module by module, or None: compiled and captured code is not.
    """

    trajectory: Trajectory
    x: Tensor
    context: Tensor | None
    guidance: float
    seed: int
    named: nn.Module | None
    build_ms: float

    @property
    def device(self) -> torch.device:
        return self.trajectory.device

    @property
    def steps(self) -> int:
        """Rows of the table."""
        return len(self.trajectory.table)

    def run(self, callback: Callable[[int, Tensor], None], noise: Noise | None = None) -> None:
        """From x_T; a callback that raises _Enough ends it."""
        n = len(self.x)
        more = {"batch_size": n, "noise": noise, "x_T": self.x, "callback": callback}
        with suppress(_Enough):
            self.trajectory(n, self.context, self.guidance, self.seed, **more)


def make_sampler(
    model: nn.Module,
    schedule: NoiseSchedule,
    table: StepTable,
    batch: int,
    context: Tensor | None,
    guidance: float,
    seed: int,
    engine: str,
) -> Sampler:
    """A trajectory as `ddpm.sampling.sample` prepares it, on the model's device, in float32.

    engine: a name in `ddpm.engines.ENGINES`. context: float32 [batch, ...] or None.
    """
    device = device_of(model)
    began = time.perf_counter()
    prepared = Trajectory(model, schedule, table, engine=engine, guided=guidance != 1.0, form=kept_form)
    synchronize(device)
    build_ms = (time.perf_counter() - began) * 1e3
    x = PhiloxNoise(seed)(torch.arange(batch, device=device), 0, Stream.INITIAL, sample_shape(model))
    context = None if context is None else context.to(device)
    return Sampler(prepared, x, context, guidance, seed, _named(model, engine), build_ms)


def _named(model: nn.Module, engine: str) -> nn.Module | None:
    """What this engine calls: hooks are not for compiled or captured code."""
    if engine == "fused":
        form = kept_form(model, torch.float32)
        return model if form.live else form
    return model if engine == "eager" else None


class _Clock:
    """Milliseconds between `begin` and `end`, on the device: CUDA events there, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begins: list[Any] = []
        self.ends: list[Any] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self.begins.append(self._now())

    def end(self) -> None:
        self.ends.append(self._now())

    def read(self) -> list[float]:
        """Every (begin, end) so far; a begin without an end is dropped."""
        pairs = zip(self.begins, self.ends, strict=False)
        if self.device.type != "cuda":
            return [(end - begin) * 1e3 for begin, end in pairs]
        synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]


def held_bytes(device: torch.device) -> int | None:
    """What the process holds now: allocated on the GPU, or resident on Linux; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def latency(sampler: Sampler, trajectories: int) -> dict[str, Any]:
    """Step times of whole trajectories, without the profiler, after a warm-up that is reported apart.

    A step lasts from the end of one callback to the start of the next, so the bar and the memory reading are not in
    it. Returns milliseconds, raw and as quantiles over all steps, and the memory held after every step in bytes.
    """
    warm = min(WARM_UP_STEPS, sampler.steps)
    first = _Clock(sampler.device)

    def warming(i: int, x0: Tensor) -> None:
        first.end()
        first.begin()
        if i + 1 == warm:
            raise _Enough

    first.begin()
    sampler.run(warming)
    runs: list[dict[str, Any]] = []
    held: list[int] = []
    with Bar("steps", trajectories * sampler.steps, "steps/s") as bar:
        for k in range(trajectories):
            clock = _Clock(sampler.device)

            def callback(i: int, x0: Tensor, clock: _Clock = clock, before: int = k * sampler.steps) -> None:
                clock.end()
                now = held_bytes(sampler.device)
                if now is not None:
                    held.append(now)
                bar.update(before + i + 1)
                clock.begin()

            synchronize(sampler.device)
            began = time.perf_counter()
            clock.begin()
            sampler.run(callback)
            synchronize(sampler.device)
            wall = (time.perf_counter() - began) * 1e3
            steps = clock.read()
            if len(steps) < sampler.steps:
                raise WorkFailed(
                    f"engine: called back after {len(steps)} steps, needs one call after each of {sampler.steps}"
                )
            runs.append({"wall_ms": round(wall, 3), "steps_ms": [round(step, 4) for step in steps]})
    pooled = [step for run in runs for step in run["steps_ms"]]
    quantiles = {name: round(float(np.quantile(pooled, q)), 4) for name, q in QUANTILES.items()}
    wall = float(np.median([run["wall_ms"] for run in runs]))
    return {
        "step_ms": {**quantiles, "mean": round(float(np.mean(pooled)), 4)},
        "images_per_s": round(sampler.x.shape[0] * 1e3 / wall, 4),
        "build_ms": round(sampler.build_ms, 3),
        "warm_up_ms": [round(step, 3) for step in first.read()[:warm]],
        "trajectories": runs,
        "held_bytes": held,
    }


@contextmanager
def _without_known_warning() -> Iterator[None]:
    """Passes on everything written to stderr meanwhile but PyTorch's line on memory from before the profiler."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        before = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            caught.seek(0)
            lines = (line for line in caught.read().splitlines(keepends=True) if KNOWN_WARNING not in line)
            os.write(2, b"".join(lines))


def profiled(sampler: Sampler, steps: int = PROFILED_STEPS) -> tuple[dict[str, Any], float]:
    """(the Chrome trace, milliseconds per step by the wall clock) of a few steps under torch.profiler.

    The step before them runs under the profiler too and does not count: the first pays for its start. Every step is a
    range; with the eager and the fused engine so are every module's forward and every draw of noise.
    """
    first = min(UNPROFILED_STEPS + 1, sampler.steps - 1)
    start, last = max(0, first - 1), min(first + steps, sampler.steps) - 1
    cuda = sampler.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
    # Kineto, the library below, announces its start and end on stderr unless its level is above them.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    seconds: list[float] = []
    with ExitStack() as running, ExitStack() as step:

        def mark() -> None:
            synchronize(sampler.device)
            seconds.append(time.perf_counter())

        def enter(i: int) -> None:
            if i == start:
                running.enter_context(_without_known_warning())
                running.enter_context(profiler)
            if i == first:
                mark()
            if i >= start:
                step.enter_context(record_function(f"{STEP if i >= first else WARM_UP}{i}"))

        def callback(i: int, x0: Tensor) -> None:
            if i == last:
                mark()
            step.close()
            if i == last:
                raise _Enough
            enter(i + 1)

        noise = None
        if sampler.named is not None:
            running.enter_context(module_ranges(sampler.named))
            noise = RangedNoise(sampler.seed)
        enter(0)
        sampler.run(callback, noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = traces.slim(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    return trace, (seconds[1] - seconds[0]) * 1e3 / (last - first + 1)


def breakdown(trace: Mapping[str, Any], wall_ms: float) -> dict[str, Any]:
    """What a step consists of: parts, operators, modules and memory, in milliseconds (bytes, flops) per step.

    parts: time in which an operator (on CUDA a kernel) ran for that part; `gaps` is the rest of the step: Python,
    dispatch and launches. They add up to wall_ms.
    """
    steps = traces.steps_of(trace)
    kernels = traces.kernels_of(trace)
    launched: dict[int, float] | None = None
    if kernels:
        launched = {}
        for begin, end, operator in kernels:
            launched[operator] = launched.get(operator, 0.0) + end - begin
    calls = [call for step in steps for call in traces.calls_of(step, launched)]
    count = len(steps)
    total = sum(call.time for call in calls)
    # Kernels of several streams may overlap: the parts share the time in which the device was busy.
    busy = traces.union([(begin, end) for begin, end, _ in kernels]) if kernels else total
    scale = busy / total / count / 1e3 if total else 0.0
    middle = steps[count // 2]
    memory = traces.memory_of(trace, middle, bool(kernels))
    parts = {name: scale * sum(call.time for call in calls if call.part == name) for name in (*PARTS, OTHER)}
    parts[GAPS] = max(0.0, wall_ms - sum(parts.values()))
    whole = sum(parts.values())
    return {
        "parts": [
            {"name": name, "ms": round(ms, 4), "share": round(ms / whole, 6)} for name, ms in parts.items() if ms > 0
        ],
        "operators": _operators(calls, count, whole),
        "modules": traces.icicle(steps),
        "memory": memory,
        "memory_peak_in": traces.module_at(middle, max(memory, key=lambda point: point[1])[0]) if memory else None,
    }


def _operators(calls: list[traces.Call], count: int, step_ms: float) -> list[dict[str, Any]]:
    """Calls by name and shapes, the most expensive first, per step."""
    groups: dict[tuple[str, str], list[traces.Call]] = {}
    for call in calls:
        groups.setdefault((call.name, str(call.dims)), []).append(call)
    rows = []
    for (name, _), group in groups.items():
        ms = sum(call.time for call in group) / count / 1e3
        counted = [call.work for call in group if call.work is not None]
        works = counted if len(counted) == len(group) else None
        flops = None if works is None else sum(work.flops for work in works) / count
        moved = None if works is None else sum(work.bytes for work in works) / count
        rows.append(
            {
                "name": name.removeprefix("aten::"),
                "shapes": [shape for shape in group[0].dims if shape],
                "parts": _parts_of(group),
                "modules": sorted({call.module for call in group})[:8],
                "calls": round(len(group) / count, 3),
                "ms": round(ms, 5),
                "share": round(ms / step_ms, 6),
                "flops": flops,
                "bytes": moved,
                "gflop_per_s": round(flops / ms / 1e6, 3) if flops is not None and ms else None,
                "gb_per_s": round(moved / ms / 1e6, 3) if moved is not None and ms else None,
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _parts_of(calls: list[traces.Call]) -> list[str]:
    """The parts of these calls, the one with the most time first."""
    times: dict[str, float] = {}
    for call in calls:
        times[call.part] = times.get(call.part, 0.0) + call.time
    return sorted(times, key=lambda part: -times[part])


def measured(sampler: Sampler, trajectories: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, trace) of a sampler: `latency`, then `breakdown` of a few profiled steps."""
    timed = latency(sampler, trajectories)
    peak = peak_bytes(sampler.device)  # before the profiler adds its own
    trace, wall_ms = profiled(sampler)
    figures = breakdown(trace, wall_ms)
    operators = figures["operators"]
    whole = sum(row["ms"] for row in operators) or 1.0
    working = sum(part["ms"] for part in figures["parts"] if part["name"] != GAPS)
    figures["profiler"] = {
        "steps": len(traces.steps_of(trace)),
        "step_ms": round(wall_ms, 4),
        "overhead": round(wall_ms / timed["step_ms"]["p50"], 4),
        "gaps_without_ms": round(max(0.0, timed["step_ms"]["p50"] - working), 4),
        "counted": round(sum(row["ms"] for row in operators if row["bytes"] is not None) / whole, 4),
    }
    figures["memory"] = {
        "step": figures["memory"],
        "step_peak_in": figures.pop("memory_peak_in"),
        "step_peak_bytes": max((held for _, held in figures["memory"]), default=None),
        "held_bytes": timed.pop("held_bytes"),
        "peak_bytes": peak,
        "weights_bytes": sum(p.numel() * p.element_size() for p in sampler.trajectory.model.parameters()),
    }
    return {"latency": timed, **figures}, trace


def peak_bytes(device: torch.device) -> int:
    """The most so far: allocated on the GPU, or resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
