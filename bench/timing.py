"""Timing calls on a device: raw samples in microseconds, never a single number.

On CUDA the kernel time comes from replays of a graph that holds one call per argument set. The sets rotate, through
more memory than the L2 cache holds where the tensors are large enough. On the CPU it is the wall time.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

Call = Callable[..., Any]
WARM_UP = 3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepare(call: Call, sets: Sequence[tuple], device: torch.device) -> Callable[[], float]:
    """A function that runs the call once per set on the device and returns its microseconds per call."""
    if device.type != "cuda":
        return lambda: _wall(call, sets, device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for arguments in sets[:WARM_UP]:
            call(*arguments)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in sets]

    def replay() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / len(kept)

    return replay


def _wall(call: Call, sets: Sequence[tuple], device: torch.device) -> float:
    """Microseconds per call of a loop over the sets, as a user's loop would see them."""
    synchronize(device)
    began = time.perf_counter()
    for arguments in sets:
        call(*arguments)
    synchronize(device)
    return (time.perf_counter() - began) * 1e6 / len(sets)


class Time(NamedTuple):
    """Microseconds of one call: on the device alone, as a user's loop sees them, and of this process's processor time.

    On the CPU the device time is the wall time.
    """

    kernel: float
    wall: float
    processor: float


Timer = Callable[[], Time]


def timer(call: Call, sets: Sequence[tuple], device: torch.device, capturable: bool = False) -> Timer:
    """A function that runs the call once per set and returns its time.

    On CUDA the kernel time comes from graph replays where the call can be captured,
    else from events around the loop, launch gaps included. Capturing warms the call up; otherwise that is the caller's.
    """
    if device.type == "cuda":
        replay = _prepare(call, sets, device) if capturable else lambda: _events(call, sets)
    else:
        replay = None

    def once() -> Time:
        kernel = None if replay is None else replay()
        before = time.process_time()
        wall = _wall(call, sets, device)
        processor = (time.process_time() - before) * 1e6 / len(sets)
        return Time(wall if kernel is None else kernel, wall, processor)

    return once


def _events(call: Call, sets: Sequence[tuple]) -> float:
    """Microseconds per call on the CUDA device from the first launch to the last kernel's end."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for arguments in sets:
        call(*arguments)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / len(sets)


def interleaved(
    timers: Mapping[str, Timer],
    rounds: int,
    seed: int = 0,
    enough: Callable[[int], bool] = lambda done: False,
    rest_s: float = 0.0,
) -> dict[str, dict[str, list[float]]]:
    """Samples of every timer, in rounds of all of them in a seeded random order, until `enough(rounds done)`.

    rest_s: seconds of rest before each sample.

    Returns: name -> field of `Time` -> microseconds per call, one per round.
    """
    samples = {name: {kind: [] for kind in Time._fields} for name in timers}
    order = random.Random(seed)  # noqa: S311 (no secret)
    for done in range(rounds):
        if enough(done):
            break
        for name in order.sample(list(timers), len(timers)):
            if rest_s:
                time.sleep(rest_s)
            for kind, value in timers[name]()._asdict().items():
                samples[name][kind].append(value)
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the raw samples of a measurement."""
    return {
        "median": median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": [round(sample, 3) for sample in samples],
    }
