"""What is measured: suites of workloads, each with an eager reference and the candidates that compete with it.

A suite is a module `bench/suites/NAME.py`, or a FILE.py of another project, with `workloads(quick) -> list[Workload]`.
Names are known before anything is built, so that `--filter` is cheap and a benchmark that disappeared is noticed.
It may have SEED, what it draws with, and `unavailable() -> {candidate: reason}`, what this installation lacks.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from bench.packages import OURS, refuse_clashes
from bench.timing import Call
from ddpm.errors import BadInput
from kernels.backend import Cost

SUITES = {
    name: f"bench.suites.{name}" for name in ("kernels", "step", "sampling", "training", "export", "peers", "ladder")
}
# Where SEED is, if not in the suite's own module.
SEEDS = {"kernels": "bench.kernels"}


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


@dataclass(frozen=True)
class Workload:
    """name: unique, begins with the suite ("step/fp32/batch32/guided"). build: makes it on a device, untimed."""

    name: str
    suite: str
    build: Callable[[torch.device], Bench]


class Unavailable(Exception):
    """A suite that this installation cannot run: says what is missing."""


def is_file(suite: str) -> bool:
    """Whether it is a suite of another project."""
    return suite.endswith(".py")


def located(suite: str) -> str:
    """The suite as processes in other folders find it: a file by its whole path, a name as it is."""
    return str(Path(suite).resolve()) if is_file(suite) else suite


@cache
def _module_in(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(f"--suite: {path}: no such file")
    for folder in (Path.cwd() / "src", Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    refuse_clashes(Path.cwd(), path)
    spec = spec_from_file_location(f"suite_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "workloads"):
        raise BadInput(f"--suite: {path}: has no workloads(quick) -> list[Workload]")
    return module


def _module(suite: str) -> ModuleType:
    """A name of SUITES, or the path of a Python file, which imports what lies in the working directory or its src/."""
    return _module_in(Path(suite).resolve()) if is_file(suite) else import_module(SUITES[suite])


def load(suite: str, quick: bool) -> list[Workload]:
    """The workloads of one suite. Raises Unavailable if it, or a package that it needs, is not there.

    An import that fails inside our own packages is an error like any other: nothing is skipped because it is broken.
    """
    try:
        return _module(suite).workloads(quick)
    except ModuleNotFoundError as error:
        if is_file(suite) or error.name is None:
            raise
        if error.name == SUITES[suite]:
            raise Unavailable(f"suite {suite}: not built yet") from None
        if error.name.partition(".")[0] in OURS:
            raise
        raise Unavailable(f"suite {suite}: needs the package {error.name!r}, which is not installed") from error


def seed_of(suite: str, workloads: Sequence[Workload]) -> int | None:
    """What these workloads of a suite (or `all`) draw with: SEED of its module.

    None for a file that says none, and where there are several.
    """
    names = {workload.suite for workload in workloads} if suite == "all" else {suite}
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


def selected(suite: str, quick: bool, pattern: str) -> tuple[list[Workload], dict[str, str]]:
    """The workloads of a suite (or `all`) whose name matches, and what is left out: {suite or candidate: reason}.

    Raises BadInput for an unknown suite, one that was asked for by name and is unavailable, a pattern that is no
    regular expression or matches nothing.
    """
    if suite != "all" and suite not in SUITES and not is_file(suite):
        raise BadInput(f"--suite: got {suite!r}, needs one of {', '.join(SUITES)}, all, or a file ending in .py")
    expression = expression_of(pattern)
    found, skipped = [], {}
    for name in SUITES if suite == "all" else [suite]:
        try:
            loaded = load(name, quick)
        except Unavailable as error:
            if suite != "all":
                raise BadInput(f"--suite: {error}") from error
            skipped[name] = str(error)
            continue
        found += loaded
        if any(expression.search(workload.name) for workload in loaded):
            skipped |= getattr(_module(name), "unavailable", dict)()
    return matching(found, expression), skipped
