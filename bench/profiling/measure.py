"""Measuring a sampler: step latencies without the profiler, a few steps with it, and what the machine does at best."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

from bench.counts import quiet_stderr
from bench.measure import convolution_ceiling
from bench.profiling import trace as traces
from bench.profiling.native import clocked
from bench.profiling.trace import AHEAD, GAPS, MODULE, STEP, WARM_UP
from bench.timing import synchronize
from ddpm.errors import WorkFailed
from ddpm.inference import kept_form
from ddpm.noise import Noise, PhiloxNoise
from ddpm.progress import Bar
from ddpm.trajectory import Trajectory
from kernels.philox import Stream

# Steps before anything is timed, and steps that the profiler sees: five keep trace.json below 5 MB.
WARM_UP_STEPS, PROFILED_STEPS = 5, 5
UNPROFILED_STEPS = 2  # at the start of the profiled trajectory
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
CEILING_SECONDS, CEILING_ROUNDS = 0.2, 8  # of a copy or product, of the convolution
# Working sets of a copy that stays in a cache (an H200's L2 holds 60 MB, a server CPU's L3 32 MB), and of one that
# cannot.
CACHED_BYTES, LARGE_BYTES = 4 * 2**20, {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX_SIDES = {"cpu": (768, 1536), "cuda": (4096, 8192)}


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """While open, the forward of every module of the model is a range."""
    opened: list[record_function] = []

    def enter(name: str) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    handles = []
    for path, module in model.named_modules():
        name = f"{MODULE}{path}|{type(module).__name__}"
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
            module.register_forward_hook(lambda *_: opened.pop().__exit__(None, None, None), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RangedNoise(PhiloxNoise):
    """The same noise, each draw of it a range. ahead: (steps, seconds) of every draw for several steps at once."""

    ahead: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        steps = step.unique().numel() if isinstance(step, Tensor) else 1
        began = time.perf_counter()
        with record_function("noise" if steps == 1 else AHEAD):
            drawn = super().__call__(samples, step, stream, shape)
        if steps > 1:
            self.ahead.append((steps, time.perf_counter() - began))
        return drawn


class _Enough(Exception):
    """Leaves an engine's trajectory early: raised by a callback, caught here."""


@dataclass(eq=False)
class Sampler:
    """A trajectory prepared, with the arguments of a call. context: float32 [batch, ...] on its device, or None."""

    trajectory: Trajectory
    batch: int
    context: Tensor | None = None
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.device, self.steps = self.trajectory.device, len(self.trajectory.table)
        samples = torch.arange(self.batch, device=self.device)
        self.x = PhiloxNoise(self.seed)(samples, 0, Stream.INITIAL, self.trajectory.shape)

    @property
    def named(self) -> nn.Module | None:
        """What is called module by module; None for engines that compile or capture code."""
        model, engine = self.trajectory.model, self.trajectory.engine
        if engine == "fused":
            form = kept_form(model, torch.float32)
            return model if form.live else form
        return model if engine == "eager" else None

    def run(self, callback: Callable[[int, Tensor], None], noise: Noise | None = None) -> None:
        """From x_T; a callback that raises _Enough ends it."""
        call = (self.batch, self.context, self.guidance, self.seed)
        with suppress(_Enough):
            self.trajectory(*call, batch_size=self.batch, noise=noise, x_T=self.x, callback=callback)

    def clocked(self) -> dict[str, Any]:
        """A trace by engine native's own clock."""
        call = (self.batch, self.context, self.guidance, self.seed)
        return clocked(self.trajectory, *call, batch_size=self.batch, x_T=self.x)

    def times(self, most: int, after_step: Callable[[int], None] = lambda i: None) -> list[float]:
        """Milliseconds of the first steps, each from the end of one callback to the start of the next.

        On CUDA between events on the device, on a CPU by the wall clock; after_step(i) is in no step.
        """
        cuda, marks = self.device.type == "cuda", []

        def mark() -> None:
            if cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())

        def callback(i: int, x0: Tensor) -> None:
            mark()
            after_step(i)
            if i + 1 == most < self.steps:
                raise _Enough
            mark()

        mark()
        self.run(callback)
        synchronize(self.device)
        pairs = zip(marks[::2], marks[1::2], strict=False)  # the last begin has no end
        return [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in pairs]


def memory(device: torch.device) -> tuple[int | None, int]:
    """Bytes that the process holds, and the most so far: allocated on the GPU, or resident, which only Linux tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    import resource  # POSIX alone has it

    statm, peak = Path("/proc/self/statm"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None
    return held, peak if sys.platform == "darwin" else peak * 1024


def latency(sampler: Sampler, trajectories: int) -> dict[str, Any]:
    """Step times of whole trajectories, without the profiler, after a warm-up that is reported apart.

    Returns milliseconds, raw and as quantiles over all steps, and the memory held after every step in bytes.
    """
    warm = sampler.times(min(WARM_UP_STEPS, sampler.steps))
    runs: list[dict[str, Any]] = []
    held: list[int | None] = []
    with Bar("steps", trajectories * sampler.steps, "steps/s") as bar:

        def after_step(i: int) -> None:
            held.append(memory(sampler.device)[0])
            bar.update(len(held))

        for _ in range(trajectories):
            synchronize(sampler.device)
            began = time.perf_counter()
            steps = sampler.times(sampler.steps, after_step)
            wall = (time.perf_counter() - began) * 1e3
            if len(steps) < sampler.steps:
                raise WorkFailed(f"engine: called back after {len(steps)} of {sampler.steps} steps, needs all")
            runs.append({"wall_ms": wall, "steps_ms": steps})
    pooled = [step for run in runs for step in run["steps_ms"]]
    quantiles = {name: float(np.quantile(pooled, q)) for name, q in QUANTILES.items()}
    return {
        "step_ms": {**quantiles, "mean": float(np.mean(pooled))},
        "images_per_s": sampler.batch * 1e3 / float(np.median([run["wall_ms"] for run in runs])),
        "warm_up_ms": warm,
        "trajectories": runs,
        "held_bytes": [now for now in held if now is not None],
    }


def profiled(sampler: Sampler, steps: int = PROFILED_STEPS) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """(the Chrome trace of a few steps under torch.profiler, `RangedNoise.ahead` of all steps up to their end).

    The step before them runs under the profiler too and does not count: the first pays for its start. Every step is a
    range; with the eager and the fused engine so are every module's forward and every draw of noise.
    """
    first = min(UNPROFILED_STEPS + 1, sampler.steps - 1)
    start, last = max(0, first - 1), min(first + steps, sampler.steps) - 1
    named = sampler.named
    noise = None if named is None else RangedNoise(sampler.seed)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if sampler.device.type == "cuda" else [])]
    profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
    with ExitStack() as running, ExitStack() as step:

        def enter(i: int) -> None:
            if i == start:
                running.enter_context(quiet_stderr())
                running.enter_context(profiler)
            if i == first:
                synchronize(sampler.device)
            if i >= start:
                step.enter_context(record_function(f"{STEP if i >= first else WARM_UP}{i}"))

        def callback(i: int, x0: Tensor) -> None:
            if i == last:
                synchronize(sampler.device)
            step.close()
            if i == last:
                raise _Enough
            enter(i + 1)

        if named is not None:
            running.enter_context(module_ranges(named))
        enter(0)
        sampler.run(callback, noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = traces.slim(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    return trace, [] if noise is None else noise.ahead


def _ceiling_cases(device: torch.device) -> Iterator[tuple[str, str, float, Callable[[], Any]]]:
    """(the rate's name, size, bytes or flops of a call, call)."""
    for name, size in (("copy_gb_per_s", LARGE_BYTES[device.type]), ("cached_copy_gb_per_s", CACHED_BYTES)):
        source, target = (torch.full((size // 2,), k, dtype=torch.uint8, device=device) for k in (0, 1))
        yield name, f"{size // 2**20} MiB", size, partial(target.copy_, source)
    generator = torch.Generator(device).manual_seed(0)
    for side in MATRIX_SIDES[device.type]:
        a, b = (torch.randn(side, side, generator=generator, device=device) for _ in range(2))
        yield "matmul_gflop_per_s", f"{side}x{side}", 2 * side**3, partial(torch.mm, a, b)


@torch.no_grad()
def ceilings(device: torch.device) -> dict[str, Any]:
    """Best rates of the device in float32: bytes/s of a copy (read + written), flop/s of a product and a convolution.

    Returns: {"copy_gb_per_s", "cached_copy_gb_per_s", "matmul_gflop_per_s", "conv_gflop_per_s"} and the sizes that
    won; the best of some rounds, because everything that disturbs only makes slower.
    """
    best: dict[str, Any] = {}
    for name, size, amount, call in _ceiling_cases(device):
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        rate = amount / min(timer.blocked_autorange(min_run_time=CEILING_SECONDS).times) / 1e9
        if rate > best.get(name, 0.0):
            best |= {name: rate, f"{name.split('_g')[0]}_at": size}
    convolution = convolution_ceiling(device, CEILING_ROUNDS)
    return best | {"conv_gflop_per_s": convolution.flops_per_s / 1e9, "conv_at": convolution.at}


def measured(sampler: Sampler, trajectories: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, trace) of a sampler: `latency`, then `breakdown` of a few profiled steps."""
    timed = latency(sampler, trajectories)
    _, peak = memory(sampler.device)  # before the profiler adds its own
    native = sampler.trajectory.engine == "native"
    trace, ahead = (sampler.clocked(), ()) if native else profiled(sampler)
    figures, median = traces.breakdown(trace, ahead), timed["step_ms"]["p50"]
    working = sum(part["ms"] for part in figures["parts"] if part["name"] != GAPS)
    overhead, gaps = figures["profiler"]["step_ms"] / median, max(0.0, median - working)
    figures["profiler"] |= {"overhead": overhead, "gaps_without_ms": gaps}
    weights = sum(p.numel() * p.element_size() for p in sampler.trajectory.model.parameters())
    figures["memory"] |= {"held_bytes": timed.pop("held_bytes"), "peak_bytes": peak, "weights_bytes": weights}
    return {"latency": timed, **figures}, trace
