"""Measuring one workload: parity first, then rounds of everything that competes, interleaved, raw samples kept.

Beside the reference and the candidates every round times two things that no change of ours can touch: a copy of as many
bytes as the workload's cost, which is the bandwidth ceiling, and the yardstick, a small convolution network in plain
torch. `time / yardstick` of two versions can be compared on one machine whatever else runs there.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import status
from bench.counts import compiled, counts
from bench.processor import queued_seconds
from bench.registry import Bench, Candidate, Workload
from bench.store import is_good
from bench.timing import Call, Timer, interleaved, synchronize, timer
from ddpm.command_line import show_trace

SEED = 0
EAGER, YARDSTICK = "eager", "yardstick"
LEAST_ROUNDS = 3
COPY_MOST = 256 * 2**20
# Samples of 0.4 ms spread by 22-31% between rounds on a busy two-core Xeon, samples of 10 ms by 5-10%.
SAMPLE_US = 4000
# (batch, channels, side) of 3x3 convolutions, channels to channels; on the CPU about 1.2 GFLOP, 15 ms of a Xeon's core.
CONVOLUTIONS = {
    "cpu": ((32, 64, 16), (16, 128, 16), (4, 256, 16), (4, 128, 32)),
    "cuda": ((256, 64, 16), (256, 128, 16), (256, 256, 16), (64, 128, 64)),
}


def yardstick(device: torch.device) -> Call:
    """A convolution, a GELU and a sum over [8, 64, 16, 16]: about a millisecond of one core."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((8, 64, 16, 16), generator=generator).to(device)
    weight = torch.randn((64, 64, 3, 3), generator=generator).to(device)

    def call() -> torch.Tensor:
        return F.gelu(F.conv2d(x, weight, padding=1)).add_(x)

    return call


def matrix_ceiling(device: torch.device, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product of random numbers, the faster of float32 and bfloat16.

    Of zeros an H200 multiplied 13% faster (769 to 798 TFLOP/s against 894).
    """
    side = 8192 if device.type == "cuda" else 512
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn((side, side), generator=torch.Generator(device).manual_seed(SEED), device=device).to(dtype)
        product = timer(torch.mm, [(a, a)], device)
        product()
        best = max(best, *(2 * side**3 / (product().kernel * 1e-6) for _ in range(rounds)))
    return best


class Convolution(NamedTuple):
    """The fastest convolution in float32, and which it was: "[32, 64, 16, 16] 3x3 channels_last"."""

    flops_per_s: float
    at: str


def convolution_cases(device: torch.device) -> Iterator[tuple[str, float, Call]]:
    """(name, flops, call) of every shape in every layout: as it comes, channels_last, with packed weights.

    Packed, which oneDNN can only: its own layout, the fastest that PyTorch has on the CPU. Written out here: no change
    of the packages can move them.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    for n, channels, side in CONVOLUTIONS[device.type]:
        x = torch.randn((n, channels, side, side), generator=generator, device=device)
        weight = torch.randn((channels, channels, 3, 3), generator=generator, device=device)
        name, flops = f"[{n}, {channels}, {side}, {side}] 3x3", 2.0 * 9 * channels**2 * n * side**2
        yield name, flops, partial(F.conv2d, x, weight, padding=1)
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        yield f"{name} channels_last", flops, partial(F.conv2d, x, weight, padding=1)
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, None)
            rest = (None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")
            yield f"{name} packed", flops, partial(torch.ops.mkldnn._convolution_pointwise, x, packed, *rest)


@cache
def _fastest_convolution(device: torch.device, threads: int) -> tuple[str, float, Timer]:
    """(name, flops, timer) of the case that wins; found once a process and number of threads: there are a dozen."""
    sets = [()] * (1 if device.type == "cpu" else 20)  # back to back, as one convolution alone is mostly launch
    best, won = 0.0, None
    for name, flops, call in convolution_cases(device):
        once = timer(call, sets, device)
        once()
        rate = flops / min(once().kernel for _ in range(2))
        if rate > best:
            best, won = rate, (name, flops, call)
    name, flops, call = won
    return name, flops, _sampler(call, sets, device)


@torch.no_grad()
def convolution_ceiling(device: torch.device, rounds: int = 5) -> Convolution:
    """The best rate of a 3x3 convolution around those that the U-Net mostly consists of, over shapes and layouts.

    The one ceiling of `run` and of `profile`.
    """
    name, flops, once = _fastest_convolution(device, torch.get_num_threads())
    return Convolution(flops / (min(once().kernel for _ in range(rounds)) * 1e-6), name)


def one_line(error: BaseException) -> str:
    """What went wrong, for a record; the traceback goes to stderr under --debug."""
    show_trace(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _sampler(call: Call, sets: Sequence[tuple], device: torch.device, capturable: bool = False) -> Timer:
    """A timer that repeats the sets until a sample lasts SAMPLE_US on the CPU, warmed up."""
    once = timer(call, sets, device, capturable)
    once()
    if device.type != "cpu":
        return once
    repeats = math.ceil(SAMPLE_US / max(once().wall * len(sets), 1))
    return timer(call, list(sets) * repeats, device) if repeats > 1 else once


def _prepared(make: Callable[[], Call], arguments: tuple, device: torch.device) -> tuple[Call, dict[str, Any]]:
    """(the call, {"warm_up_s", "parity"})."""
    began = time.perf_counter()
    call = make()
    call(*arguments)
    synchronize(device)
    return call, {"warm_up_s": time.perf_counter() - began, "parity": True}


def _judged(candidate: Candidate, call: Call) -> dict[str, Any]:
    """{"error", "tolerance", "parity"}; one that is not finite is a word, JSON has no NaN. Below 0 is no distance."""
    error = float(candidate.error(call))
    return {
        "error": error if math.isfinite(error) else str(error),
        "tolerance": candidate.tolerance,
        "parity": 0 <= error <= candidate.tolerance,
    }


def measure(
    workload: Workload, device: torch.device, rounds: int, seconds: float, ceiling: float | None
) -> list[dict[str, Any]]:
    """One record per competitor, the eager reference first. Nothing that goes wrong inside a workload is raised.

    rounds: at most; it ends after `seconds` if three are done. They are seconds of processor time on the CPU, so that a
    busy machine takes longer and not fewer samples. ceiling: FLOP/s of `matrix_ceiling`; without one no share of it.
    A record of a candidate that crashed has "failed", one that lost parity "parity": false and no times.
    """
    head = {"workload": workload.name, "suite": workload.suite}
    row = partial(status.row, workload.name, file=workload.file)
    calls: dict[str, Call] = {}
    found: dict[str, dict[str, Any]] = {}
    status.say(row(EAGER))
    before = compiled()
    try:
        bench = workload.build(device)
        calls[EAGER], found[EAGER] = _prepared(lambda: bench.reference, bench.sets[0], device)
        found[EAGER] |= {"frozen": bench.frozen, "counts": compiled().since(before)}
    except Exception as error:
        return [head | {"candidate": EAGER, "failed": one_line(error)}]
    for name, candidate in bench.candidates.items():
        status.say(row(name))
        before = compiled()
        try:
            calls[name], found[name] = _prepared(candidate.make, bench.sets[0], device)
            found[name] |= _judged(candidate, calls[name]) | {"counts": compiled().since(before)}
        except Exception as error:
            found[name] = {"failed": one_line(error)}
    calls = {name: call for name, call in calls.items() if is_good(found[name])}
    try:
        for name, figures in _timed(bench, calls, device, rounds, seconds, ceiling, row).items():
            figures["counts"] = _sum(found[name]["counts"], figures["counts"])
            found[name] |= figures
    except Exception as error:
        reason = one_line(error)
        found |= {name: {"failed": reason} for name in calls}
    broken = [name for name in found if name not in calls]
    return [head | {"candidate": name} | found[name] for name in (*calls, *broken)]


def _timed(
    bench: Bench,
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    seconds: float,
    ceiling: float | None,
    row: Callable[[str], str],
) -> dict[str, dict[str, Any]]:
    """What a record says of time and memory, by candidate. row: what a candidate's row is called (`status.row`)."""
    half = int(min(max(bench.cost.bytes, 2), COPY_MOST) // 2)
    buffers = [tuple(torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2)) for _ in bench.sets]
    timers, warmed = {}, {}
    for name, call in calls.items():
        before = compiled()
        timers[name] = status.told(row(name), _sampler(call, bench.sets, device, bench.capturable))
        warmed[name] = compiled().since(before)
    timers["copy"] = _sampler(lambda to, source: to.copy_(source), buffers, device, bench.capturable)
    timers[YARDSTICK] = _sampler(yardstick(device), [()], device)
    clock = time.process_time if device.type == "cpu" else time.monotonic
    began = clock()
    samples = interleaved(
        timers, rounds, SEED, lambda done: done >= LEAST_ROUNDS and clock() - began > seconds, bench.rest_s
    )
    copy_rate = 2 * half / (median(samples["copy"]["kernel"]) * 1e-6)
    found = {
        name: _figures(bench, samples, name, copy_rate, ceiling)
        | _gate(samples, name, YARDSTICK if name == EAGER or not bench.frozen else EAGER, device)
        for name in calls
    }
    for name, call in calls.items():  # counted last, which disturbs no time
        status.say(row(name))
        counted = counts(partial(call, *bench.sets[0]), device)
        found[name] |= counted | {"counts": counted["counts"] | warmed[name]}
    return found


def _sum(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + count for name, count in second.items()}


Samples = Mapping[str, Mapping[str, list[float]]]


def _paired(first: list[float], second: list[float]) -> float:
    """The median over rounds of first / second."""
    return median(a / b for a, b in zip(first, second, strict=True))


def _unqueued(samples: Mapping[str, list[float]]) -> list[float]:
    """At least a nanosecond: a preemption just outside the timed window is in the queue and not in the wall time."""
    return [max(wall - queued, 1e-3) for wall, queued in zip(samples["wall"], samples["queued"], strict=True)]


def _figures(bench: Bench, samples: Samples, name: str, copy_rate: float, ceiling: float | None) -> dict[str, Any]:
    """Times are microseconds per unit (`Bench.calls`), rates per second."""
    kernel, wall = samples[name]["kernel"], samples[name]["wall"]
    seconds = median(kernel) * 1e-6
    return {
        "kernel_us": median(kernel) / bench.calls,
        "wall_us": median(wall) / bench.calls,
        "images_per_s": None if bench.images is None else bench.images / (median(wall) * 1e-6),
        "speed_up": None if name == EAGER else _paired(samples[EAGER]["kernel"], kernel),
        "bytes_per_s": bench.cost.bytes / seconds,
        "share_of_copy": bench.cost.bytes / seconds / copy_rate,
        "flops_per_s": bench.cost.flops / seconds,
        "share_of_product": None if ceiling is None else bench.cost.flops / seconds / ceiling,
    }


def _gate(samples: Samples, name: str, against: str, device: torch.device) -> dict[str, Any]:
    """What `compare` takes of a process: medians over rounds of time / time of `against`, and the raw samples.

    gate: on the CPU processor time. On a busy machine wall times of one row spread by 30-60% between processes,
    whatever the statistic, because others take the processor away; processor time counts only while we have it.
    wall_gate: wall time less what the thread queued for a processor, which spreads like processor time and sees
    waiting; where the system does not say, the smallest wall time over rounds over the smallest of `against`.
    """
    kind = "kernel" if device.type == "cuda" else "processor"
    if queued_seconds() is None:
        wall = min(samples[name]["wall"]) / min(samples[against]["wall"])
    else:
        wall = _paired(_unqueued(samples[name]), _unqueued(samples[against]))
    return {
        "gate": _paired(samples[name][kind], samples[against][kind]),
        "wall_gate": wall,
        "against": against,
        "samples_us": {
            name: {kind: [round(sample, 3) for sample in values] for kind, values in samples[name].items()}
            for name in (name, against)
        },
    }
