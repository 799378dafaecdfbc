"""Ends that no program can prevent: SIGKILL at any moment, before every call that changes a file, power cuts."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.calls import CHANGING, Disk, at_call, kills_itself
from tests.faults.processes import PROGRAMS, Child, Lost, call, start
from tests.faults.tries import Try, Wanted, draws
from tests.faults.works import WORKS, Shop, Undisturbed, Work, check_healed, check_reader, check_versions

KILLED, POWER, MOMENT = "killed before a file changes", "power cut", "killed at a random moment"
CASES = KILLED, POWER, MOMENT
MOMENTS = 6  # of each command


def _after_a_stop(folder: Path, work: Work, normal: Undisturbed) -> None:
    check_versions(folder, normal, partials=True)
    check_reader(folder, work, normal)
    check_healed(folder, work, normal)


def before_call(shop: Shop, work: Work, number: int, folder: Path) -> None:
    normal = shop.undisturbed(work)
    shop.stocked(folder, work.start)
    call(folder, work.words, at_call(number, kills_itself, CHANGING)).need(-signal.SIGKILL)
    _after_a_stop(folder, work, normal)


def power_cut(shop: Shop, work: Work, number: int, folder: Path) -> None:
    """number: of the call it comes before; of the last one + 1: after the command has ended."""
    normal = shop.undisturbed(work)
    shop.stocked(folder, work.start)
    if number < len(normal.calls):
        call(folder, work.words, Disk().watch(number)).need(-signal.SIGKILL)
        _after_a_stop(folder, work, normal)
        return

    def ends() -> object:
        disk = Disk()
        disk.watch(None)()
        code = PROGRAMS[work.words[0]](list(work.words[1:]))
        disk.cut()
        return code

    Child(folder, ends, work.name).wait().need()
    check_versions(folder, normal, partials=False)


def at_a_moment(shop: Shop, work: Work, seed: int, folder: Path) -> None:
    normal = shop.undisturbed(work)
    shop.stocked(folder, work.start)
    child = start(folder, work.words)
    time.sleep(draws(work.name, seed).uniform(0.02, normal.seconds))
    child.send(signal.SIGKILL)
    ended = child.wait()
    if ended.code not in (0, -signal.SIGKILL):
        raise Lost(f"{work.name}: ended with {ended.code}; said: {ended.last()}")
    _after_a_stop(folder, work, normal)


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    for work in WORKS:
        if not any(wanted(case, work.name) for case in CASES):
            continue
        calls = shop.undisturbed(work).calls
        for number, (kind, name) in enumerate(calls):
            yield Try(KILLED, work.name, f"call {number}: {kind} {name}", before_call, (work, number))
        renamed = [number + 1 for number, (kind, _) in enumerate(calls) if kind == "os.rename"]
        for number in sorted({*renamed, len(calls)}):
            yield Try(POWER, work.name, f"before call {number} of {len(calls)}", power_cut, (work, number))
        for seed in range(MOMENTS):
            yield Try(MOMENT, work.name, f"seed {seed}", at_a_moment, (work, seed))
