"""Timing calls on a device: raw samples in microseconds, never a single number.

On CUDA the kernel time comes from replays of a graph that holds one call per argument set; the sets rotate through more
memory than the L2 cache holds. On the CPU it is the wall time.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

Call = Callable[..., Any]
WARM_UP = 3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_times(call: Call, sets: Sequence[tuple], device: torch.device, rounds: int) -> list[float]:
    """Microseconds per call of a loop over the sets, as a user's loop would see them: `rounds` samples."""
    for arguments in sets[:WARM_UP]:
        call(*arguments)
    samples = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        for arguments in sets:
            call(*arguments)
        synchronize(device)
        samples.append((time.perf_counter() - began) * 1e6 / len(sets))
    return samples


def kernel_times(call: Call, sets: Sequence[tuple], device: torch.device, rounds: int) -> list[float]:
    """Microseconds per call on the device alone: `rounds` samples (on the CPU the wall times)."""
    if device.type != "cuda":
        return wall_times(call, sets, device, rounds)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for arguments in sets[:WARM_UP]:
            call(*arguments)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in sets]
    graph.replay()
    samples = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(sets))
    del kept
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the raw samples of a measurement."""
    return {
        "median": median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": [round(sample, 3) for sample in samples],
    }
