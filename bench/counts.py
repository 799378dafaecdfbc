"""What hardly varies between processes, of one call: operators, bytes, graph breaks. Counted after it was timed."""

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.timing import synchronize


class _Operators(TorchDispatchMode):
    """Counts what PyTorch dispatches: of a compiled graph what it calls, not the inside of an operator of C++."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch wraps what follows in a function that loads torch._dynamo, seconds, to keep it out."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else code that torch.compile made runs eagerly under this mode, and ever after in this process."""
        return True

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return operator(*arguments, **(options or {}))


def operators(call: Callable[[], Any]) -> int:
    """How many operators one call dispatches."""
    if "torch._dynamo" in sys.modules and not hasattr(TorchDispatchMode, "ignore_compile_internals"):
        raise RuntimeError("this PyTorch would from then on run compiled code eagerly")
    with _Operators() as mode:
        call()
    return mode.count


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """PyTorch's profiler prints two lines at every start and stop, from C++."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def torch_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, int] | None:
    """(all bytes, the most held at once above what was there) that one call takes from PyTorch's allocators.

    None if it took nothing. On the CPU the profiler replays allocations; memory of other runtimes (ONNX Runtime) is not
    seen.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        after = torch.cuda.memory_stats(device)
        held, total = "allocated_bytes.all.current", "allocated_bytes.all.allocated"
        peak = torch.cuda.max_memory_allocated(device) - before.get(held, 0)
        return after.get(total, 0) - before.get(total, 0), peak
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    total = held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        total += max(event.nbytes(), 0)
        peak = max(peak, held)
    return (total, peak) if events else None


def python_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that one call holds at once, above what was there, in Python's objects and NumPy's arrays."""
    collects, traces = gc.isenabled(), tracemalloc.is_tracing()
    gc.collect()
    gc.disable()  # when it would run depends on what ran before
    if not traces:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traces:
            tracemalloc.stop()
        if collects:
            gc.enable()


class Compiled(NamedTuple):
    """What torch.compile did in this process so far: graph breaks, and which of its compilations were repeated ones."""

    graph_breaks: int
    recompiled: frozenset[tuple]

    def since(self, before: "Compiled") -> dict[str, int]:
        """As counts of a record."""
        breaks = max(self.graph_breaks - before.graph_breaks, 0)
        return {"graph_breaks": breaks, "recompiles": len(self.recompiled - before.recompiled)}


def compiled() -> Compiled:
    """Zeros where torch.compile was never used: importing torch._dynamo to ask would cost seconds."""
    module = sys.modules.get("torch._dynamo.utils")
    if module is None:
        return Compiled(0, frozenset())
    again = [metrics for metrics in module.get_compilation_metrics() if metrics.recompile_reason is not None]
    names = frozenset((metrics.compile_id, metrics.start_time_us) for metrics in again)
    return Compiled(sum(module.counters["graph_break"].values()), names)


def counts(call: Callable[[], Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Of a record, of one call: counts {name: count}, uncounted {name: why}, and peak_memory_bytes of torch alone."""
    found: dict[str, int] = {}
    wrong: dict[str, str] = {}
    taken = None
    try:
        found["operators"] = operators(call)
    except Exception as error:  # what a call does under a dispatch mode or a profiler is not its fault
        wrong["operators"] = f"{type(error).__name__}: {error}"
    try:
        taken = torch_bytes(call, device)
        allocated, peak = taken or (0, 0)
        found |= {"allocated_bytes": allocated, "peak_bytes": peak + python_bytes(call)}
    except Exception as error:
        wrong |= dict.fromkeys(("allocated_bytes", "peak_bytes"), f"{type(error).__name__}: {error}")
    peak_memory = None if taken is None else taken[1]
    return {"counts": found, "peak_memory_bytes": peak_memory} | ({"uncounted": wrong} if wrong else {})
