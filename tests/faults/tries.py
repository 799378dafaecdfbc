"""A try: one thing that happens to one command, in a process and a folder of its own, and what became of it."""

import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.processes import LIMIT, POLL, Child, Lost

# A try is a few commands; each of them has a limit of its own.
TRY_LIMIT = 3 * LIMIT
# (case, what): whether tries of it were asked for.
Wanted = Callable[[str, str], bool]


@dataclass(frozen=True)
class Try:
    """case: the row of the table; what: the command or file; how: what happens. `run(shop, *arguments, folder)`."""

    case: str
    what: str
    how: str
    run: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.case} / {self.what} / {self.how}"


def draws(*named: object) -> np.random.Generator:
    """Random numbers that depend on these names alone."""
    return np.random.default_rng(zlib.crc32(repr(named).encode()))


@dataclass(frozen=True)
class Outcome:
    """lost: what was, None if all that must hold held."""

    tried: Try
    lost: str | None


def _tried(one: Try, shop: Any, folder: Path) -> int:
    """The work of a try's process: its exit code and last line tell what became of it."""
    try:
        one.run(shop, *one.arguments, folder / "work")
    except Lost as lost:
        print(f"lost: {' '.join(str(lost).split())}", file=sys.stderr)
        return 1
    return 0


def outcomes(tries: Iterable[Try], shop: Any, folder: Path, jobs: int) -> Iterator[Outcome]:
    """Of each try, in the order in which they end, so many at a time."""
    waiting, running = iter(tries), {}
    count = 0
    while True:
        while len(running) < jobs and (one := next(waiting, None)) is not None:
            place = folder / str(count := count + 1)
            place.mkdir()
            child = Child(place, lambda one=one, place=place: _tried(one, shop, place), one.name)
            running[child.pid] = one, child, place, time.monotonic()
        if not running:
            return
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        pid = found.si_pid if found is not None else None
        late = [pid for pid, (*_, began) in running.items() if time.monotonic() - began > TRY_LIMIT]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        if pid not in running:
            time.sleep(POLL)
            continue
        one, child, place, _ = running.pop(pid)
        ended = child.wait()
        lost = None if ended.code == 0 else ended.last().removeprefix("lost: ")
        lost = lost if ended.code in (0, 1) else f"the try itself ended with {ended.code}: {lost}"
        shutil.rmtree(place, ignore_errors=True)
        yield Outcome(one, lost)
