"""What is measured: suites of workloads, each with an eager reference and the candidates that compete with it.

A suite is a module `bench/suites/NAME.py`, or a FILE.py of another project, with `workloads(quick) -> list[Workload]`.
Names are known before anything is built, so that `--filter` is cheap and a benchmark that disappeared is noticed.
It may have SEED, what it draws with, and `unavailable() -> {candidate: reason}`, what this installation lacks.
"""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from bench.packages import OURS
from bench.suite_files import Unavailable, explained, is_file, module_in, refuse_absent, shown
from bench.timing import Call
from ddpm.errors import BadInput
from ddpm.extras import lacks

NAMES = ("kernels", "step", "sampling", "networks", "training", "export", "peers", "ladder")
SUITES = {name: f"bench.suites.{name}" for name in NAMES}
# What is timed beside a workload's candidates: one of these names would get its times.
TIMED_BESIDE = ("eager", "copy", "yardstick")
# Where SEED is, if not in the suite's own module.
SEEDS = {"kernels": "bench.kernels"}


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes: bytes of memory traffic, floating-point operations.

    Not `kernels.backend.Cost`, which is per element, and which brings all operators and Triton with it.
    """

    bytes: float
    flops: float


@dataclass(frozen=True)
class Candidate:
    """One way to do a workload.

    make: builds the call; its seconds plus those of the first call are the warm-up column.
    error: the parity error of this call, measured before anything is timed; NaN is no parity.
    tolerance: the largest error that is parity.
    """

    make: Callable[[], Call]
    error: Callable[[Call], float]
    tolerance: float


@dataclass(frozen=True)
class Bench:
    """A workload that is built.

    sets: argument sets that rotate through `reference` and the candidates. cost: bytes and flops of one call.
    calls: units (solver steps) in one call; times are divided by it. images: per call, where a call ends in images.
    frozen: whether the reference consists of plain torch operators written in bench/, so that no change of the
        packages can slow it; ratios to it show every change. Where it is our own code, as in `step`, a slowdown of
        what both share would hide in them, and `compare` takes the yardstick (see `bench.measure`).
    capturable: whether calls can be captured in a CUDA graph, whose replays give the kernel time.
    rest_s: seconds of rest before each sample, where competitors have threads of their own that spin after a call.
    """

    sets: Sequence[tuple]
    reference: Call
    candidates: Mapping[str, Candidate]
    cost: Cost
    calls: int = 1
    images: int | None = None
    frozen: bool = False
    capturable: bool = False
    rest_s: float = 0.0

    def __post_init__(self) -> None:
        for name in TIMED_BESIDE:
            if name in self.candidates:
                raise BadInput(f"candidates: got {name!r}, which is what else is timed, needs another name")


@dataclass(frozen=True)
class Workload:
    """name: unique, begins with the suite ("step/fp32/batch32/guided"). build: makes it on a device, untimed.

    file: the suite's, for messages; filled in when a suite is loaded.
    """

    name: str
    suite: str
    build: Callable[[torch.device], Bench]
    file: str = ""


def _module(suite: str) -> ModuleType:
    """A name of SUITES, or the path of a Python file, which imports what lies in the working directory or its src/."""
    return module_in(Path(suite).resolve()) if is_file(suite) else import_module(SUITES[suite])


def _listed(suite: str, quick: bool) -> list[Workload]:
    """What a suite's workloads(quick) returns, with its file."""
    module = _module(suite)
    if not is_file(suite):
        return module.workloads(quick)
    path = Path(suite).resolve()
    with explained(path):
        found = module.workloads(quick)
    if not isinstance(found, list | tuple) or not all(isinstance(workload, Workload) for workload in found):
        raise BadInput(
            f"--suite: {shown(path)}: workloads(quick) returned {reprlib.repr(found)}, needs a list of Workload"
        )
    return [replace(workload, file=shown(path)) for workload in found]


def load(suite: str, quick: bool) -> list[Workload]:
    """The workloads of one suite. Raises Unavailable if it, or a package that it needs, is not there.

    An import that fails inside our own packages is an error like any other: nothing is skipped because it is broken.
    """
    try:
        return _listed(suite, quick)
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        if error.name == SUITES[suite]:
            raise Unavailable(f"suite {suite}: not built yet") from None
        if error.name.partition(".")[0] in OURS:
            raise
        raise Unavailable(f"suite {suite}: {lacks(error.name)}") from error


def _names(suites: str | Sequence[str]) -> list[str]:
    """Each suite once, those of `all` in its place."""
    asked = [suites] if isinstance(suites, str) else suites
    return list(dict.fromkeys(name for suite in asked for name in (SUITES if suite == "all" else (suite,))))


def seed_of(suites: str | Sequence[str], workloads: Sequence[Workload]) -> int | None:
    """What these workloads of some suites (or `all`) draw with: SEED of their modules.

    None for a file that says none, and where there are several.
    """
    drawing = {workload.suite for workload in workloads}
    names = [name for name in _names(suites) if "all" not in suites or is_file(name) or name in drawing]
    modules = (import_module(SEEDS[name]) if name in SEEDS else _module(name) for name in names)
    seeds = {getattr(module, "SEED", None) for module in modules}
    return seeds.pop() if len(seeds) == 1 else None


def expression_of(pattern: str) -> re.Pattern[str]:
    """The regular expression of --filter. Raises BadInput if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadInput(f"--filter: {pattern!r} is no regular expression ({error})") from error


def matching(workloads: Sequence[Workload], expression: re.Pattern[str]) -> list[Workload]:
    """Those whose name matches. Raises BadInput if there is none."""
    found = [workload for workload in workloads if expression.search(workload.name)]
    if not found:
        names = "; ".join(workload.name for workload in workloads) or "nothing"
        raise BadInput(f"--filter: {expression.pattern!r} matches none of: {names}")
    return found


def check_suites(suites: Sequence[str]) -> None:
    """Raise BadInput for a suite that is neither one of ours nor a file. Imports none: that is for the processes."""
    for suite in suites:
        if is_file(suite):
            refuse_absent(suite)
        elif suite != "all" and suite not in SUITES:
            raise BadInput(f"--suite: got {suite!r}, needs one of {', '.join(SUITES)}, all, or a file ending in .py")


def _refuse_twins(workloads: Sequence[Workload]) -> None:
    """Raise BadInput if two have one name: their times would be taken for one row's."""
    first: dict[str, Workload] = {}
    for workload in workloads:
        twin = first.setdefault(workload.name, workload)
        if twin is not workload:
            files = " and ".join(dict.fromkeys(one.file or one.suite for one in (twin, workload)))
            raise BadInput(f"--suite: {files}: two workloads are called {workload.name}, needs a name for each")


def selected(suites: str | Sequence[str], quick: bool, pattern: str) -> tuple[list[Workload], dict[str, str]]:
    """The workloads of suites (or `all`) whose name matches, and what is left out: {suite or candidate: reason}.

    Raises BadInput for an unknown suite, one that was asked for by name and is unavailable or has no workloads, a
    pattern that is no regular expression or matches nothing.
    """
    asked = _names(suites)
    check_suites(asked)
    expression = expression_of(pattern)
    found, skipped = [], {}
    for name in asked:
        try:
            loaded = load(name, quick)
        except Unavailable as error:
            if "all" not in suites:
                raise BadInput(f"--suite: {error}") from error
            skipped[name] = str(error)
            continue
        found += loaded
        if any(expression.search(workload.name) for workload in loaded):
            skipped |= getattr(_module(name), "unavailable", dict)()
    if not found and "all" not in suites:
        names = ", ".join(shown(Path(name)) if is_file(name) else name for name in asked)
        raise BadInput(f"--suite: {names}: workloads({quick}) returned none, needs at least one")
    _refuse_twins(found)
    return matching(found, expression), skipped
