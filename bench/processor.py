"""Processor time of this process and of its children, and the time that a thread queued for a processor."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # no POSIX
    resource = None

PROC = Path("/proc")
THREAD = PROC / "thread-self" / "schedstat"


def _children(pid: int | str) -> Iterator[int]:
    """The live children of a process, zombies too, by Linux; none elsewhere, or if it is gone."""
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            yield from map(int, (task / "children").read_bytes().split())
    except OSError:  # it ended meanwhile, or this is no Linux
        return


def _descendants(pid: int | str) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _live_seconds(pid: int) -> float:
    """Processor time of a live process, threads that ended included, and of the children it has waited for."""
    try:
        own = time.clock_gettime(~pid << 3 | 2)  # its CPUCLOCK_SCHED (clock_getcpuclockid), in nanoseconds
        fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return own + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime


def children_seconds() -> float:
    """Processor time so far of all descendants: of those that ended (and were waited for), on Linux of live ones too.

    Not of one that outlives its parent, which is then no descendant, nor of a server that was there before.
    """
    if resource is None:
        return 0.0
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(map(_live_seconds, _descendants("self"))) + ended.ru_utime + ended.ru_stime


def queued_seconds() -> float | None:
    """How long this thread was ready to run and had no processor, by Linux's schedstat; None where there is none."""
    try:
        ran, queued, _ = map(int, THREAD.read_bytes().split())
    except (OSError, ValueError):
        return None
    return queued * 1e-9 if ran else None  # all zeros: this kernel does not count
