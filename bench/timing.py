"""Timing calls on a device: raw samples in microseconds, never a single number.

On CUDA the kernel time comes from replays of a graph that holds one call per argument set. The sets rotate, through
more memory than the L2 cache holds where the tensors are large enough. On the CPU it is the wall time.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench.processor import children_seconds, queued_seconds

Call = Callable[..., Any]
WARM_UP = 3


class Time(NamedTuple):
    """Microseconds of one call.

    kernel: on the device alone; on the CPU the wall time. wall: as a user's loop sees them. processor: processor time
    of this process and of its children. queued: of the wall time, what this thread was ready for and had no processor,
    because others had it; 0 where the system does not say.
    """

    kernel: float
    wall: float
    processor: float
    queued: float = 0.0


Timer = Callable[[], Time]


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _captured(call: Call, sets: Sequence[tuple], device: torch.device) -> Callable[[], Any]:
    """A replay of one CUDA graph of the call on every set."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for arguments in sets[:WARM_UP]:
            call(*arguments)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in sets]

    def replay() -> list[Any]:
        graph.replay()
        return kept  # the graph writes to their memory

    return replay


def _between_events(work: Callable[[], Any]) -> float:
    """Microseconds on the CUDA device from the first launch to the last kernel's end."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def timer(call: Call, sets: Sequence[tuple], device: torch.device, capturable: bool = False) -> Timer:
    """A function that runs the call once per set and returns its time.

    On CUDA the kernel time comes from graph replays where the call can be captured,
    else from events around the loop, launch gaps included. Capturing warms the call up; otherwise that is the caller's.
    """

    def loop() -> None:
        for arguments in sets:
            call(*arguments)

    cuda = device.type == "cuda"
    work = _captured(call, sets, device) if cuda and capturable else loop

    def once() -> Time:
        kernel = _between_events(work) if cuda else None
        synchronize(device)
        children, queued = children_seconds(), queued_seconds() or 0.0
        processor, began = time.process_time(), time.perf_counter()
        loop()
        synchronize(device)
        wall, processor = time.perf_counter() - began, time.process_time() - processor
        queued = min((queued_seconds() or 0.0) - queued, wall)
        processor += max(children_seconds() - children, 0.0)
        device_us = wall * 1e6 if kernel is None else kernel
        return Time(*(us / len(sets) for us in (device_us, wall * 1e6, processor * 1e6, queued * 1e6)))

    return once


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
