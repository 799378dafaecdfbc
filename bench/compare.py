"""`ddpm-bench compare BASE HEAD`: is head slower than base? Two stored files, or two git refs measured here and now."""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import checkouts, config, machine, packages, store, verdicts
from bench.children import TIMEOUT, Running, run_child, time_limit
from bench.comparison import KIND, compare_markdown, compare_table, result_of
from bench.config import TABLE, TooNoisy
from bench.measure import one_line
from bench.registry import check_suites, expression_of
from bench.run import merged, refuse_unwritable, suite_arguments
from bench.suite_files import is_file, located
from bench.verdicts import LEAST_PROCESSES, NOT_RUN, THRESHOLD, TOO_NOISY, Pair, Thresholds, Verdict
from ddpm.command_line import typed
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import json_text, write_text
from ddpm.progress import Bar

PROCESSES = 8
FIRST_ROUND, SECOND_ROUND = 0, 1
# Processes of the second round as a multiple of the first's. There is one only where something is suspected, and it
# runs the suspects alone; both rounds together decide (`verdicts.pooled`).
AGAIN = 2
# Options that mean nothing to the other kind.
OF_REFS, OF_FILES = ("suite", "quick", "pattern", "processes", "build", "timeout"), ("across_machines",)
OURS = "kernels"  # what is measured of this project unless something is asked for

MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")

Contents = dict[str, list[store.Content]]


@dataclass(frozen=True)
class Job:
    """What is measured of two refs. build: a command for each checkout, None for what its project says, "" for none.

    configured: whether a pyproject.toml named the suites.
    """

    suites: list[str]
    quick: bool
    pattern: str
    processes: int
    timeout: float
    build: str | None
    configured: bool = False

    def arguments(self, workloads: Sequence[str] = ()) -> list[str]:
        """Of `run`, beside the suites: for the whole job, or for some of its workloads."""
        pattern = f"^({'|'.join(map(re.escape, workloads))})$" if workloads else self.pattern
        return ["--filter", pattern, "--no-ceilings", *(["--quick"] if self.quick else [])]


class CertainFailure(Exception):
    """Rows that broke while others were still to be measured: whatever these show, something did not run."""

    def __init__(self, found: list[Verdict], contents: Contents) -> None:
        super().__init__(f"{found[0].row}: {found[0].status} {found[0].detail}")
        self.found, self.contents = found, contents


def _is_not_installed(error: str, both: Path) -> bool:
    """Whether a row failed for want of a module that neither commit has: one that base still depends on, say."""
    missing = MISSING.search(error)
    return missing is not None and not any(any(both.rglob(name)) for name in (missing[1], f"{missing[1]}.*"))


def _certain(contents: Contents, both: Path) -> list[Verdict]:
    """The rows that are broken for good. One that never ran in base is not: there is nothing to compare it with.

    both: the folder of the checkouts; what base lacks and they have is new, what both lack hides how fast base is.
    """
    found = []
    for side, several in contents.items():
        rows = store.rows([record for content in several for record in content["records"]])
        for row, records in rows.items():
            broken = verdicts.trouble(row, side, records, len(several))
            if broken is None:
                continue
            if side == "head" or any(map(store.is_good, records)) or _is_not_installed(broken.detail, both):
                found.append(broken)
    return found


def measure_sides(
    found: checkouts.Checkouts, processes: int, arguments: list[str], label: str, seed: int, timeout: float
) -> dict[str, store.Content]:
    """`run` of a side's suites in so many fresh processes, both sides in pairs of random order: ABBA-like.

    Raises WorkFailed if one ended without a result, and CertainFailure as soon as a row is broken.
    """
    contents: Contents = {side: [] for side in found.sides}
    order = random.Random(seed)  # noqa: S311 (no secret)
    with Bar(label, processes * len(contents), "processes/s") as bar:
        running = Running(bar)
        for process in range(processes):
            for side in order.sample(list(contents), len(contents)):
                checkout = found.sides[side]
                line = [*suite_arguments(checkout.suites), *arguments]
                where = {"paths": checkout.paths, "extra": checkout.extra, "side": side}
                how = {"timeout": timeout, "on_row": running.of(side)}
                try:
                    contents[side].append(run_child(checkout.folder, process, line, **where, **how))
                except BadInput as error:
                    raise WorkFailed(str(error)) from error
                running.ended(side)
                broken = _certain(contents, checkout.root.parent)
                if broken:
                    raise CertainFailure(broken, contents)
    return {side: merged(several) for side, several in contents.items()}


def compare_files(
    base: Path, head: Path, thresholds: Thresholds, across_machines: bool
) -> tuple[list[Pair], list[Verdict]]:
    """Verdicts on two stored files, which were not interleaved: drift between them looks like a change."""
    contents = store.load(base), store.load(head)
    quick = [content.get("quick") for content in contents]
    if None not in quick and quick[0] != quick[1]:  # a suite may do less under the same names
        raise BadInput(f"base was measured {'with' if quick[0] else 'without'} --quick and head not so, needs the same")
    for difference in verdicts.comparable(*contents, across_machines):
        print(f"note: {difference}", file=sys.stderr)
    print("note: stored files were not measured side by side; what the machine did in between counts", file=sys.stderr)
    return [contents], verdicts.judge(*contents, thresholds)


def _measured(
    found: checkouts.Checkouts, job: Job, thresholds: Thresholds
) -> tuple[list[dict[str, store.Content]], list[Verdict]]:
    """Both rounds: rows that may be slower are measured once more, in more processes."""
    warned = machine.warn(machine.busy_warning())
    contents = measure_sides(found, job.processes, job.arguments(), "compare", FIRST_ROUND, job.timeout)
    if not warned:
        loads = [(content["machine"].get("load") or {}).get("others") for content in contents.values()]
        machine.warn(machine.warning_of(max(filter(None, loads), default=None)))
    rows = verdicts.judge(*contents.values(), thresholds)
    suspects = verdicts.suspects(rows)
    if suspects:
        records = [record for content in contents.values() for record in content["records"]]
        arguments = job.arguments(sorted({r["workload"] for r in records if store.row_of(r) in suspects}))
        again = measure_sides(found, AGAIN * job.processes, arguments, "confirm", SECOND_ROUND, job.timeout)
        return [contents, again], verdicts.pooled(tuple(contents.values()), tuple(again.values()), thresholds)
    return [contents], rows


def compare_refs(base: str, head: str, job: Job, thresholds: Thresholds) -> tuple[list[Pair], list[Verdict]]:
    """Verdicts on two git refs. What is certainly broken ends it, and is then all that is told."""
    check_suites([suite for suite in job.suites if not is_file(suite)])  # a file may be in one of the commits alone
    expression_of(job.pattern)
    commits = {"base": checkouts.commit_of(base), "head": checkouts.commit_of(head)}
    checkouts.refuse_dirty()
    asked = job.suites, job.quick, job.pattern, job.build, job.timeout, job.configured
    with checkouts.checkouts(*commits.values(), *asked) as found:
        rows = [Verdict(name, "missing", detail="base has this benchmark, head has not") for name in found.gone]
        rounds: list[dict[str, store.Content]] = [{}]
        try:
            if not rows:
                rounds, rows = _measured(found, job, thresholds)
            else:  # a renamed one shows as both
                rows += [
                    Verdict(name, verdicts.NEW, detail="head has this benchmark, base has not") for name in found.new
                ]
        except CertainFailure as failure:
            rows = failure.found
            rounds = [{side: merged(several) for side, several in failure.contents.items() if several}]
    if any(row.status in verdicts.BROKEN for row in rows):
        print("note: stopped at the first certain failure, other rows were not measured to the end", file=sys.stderr)
    for side, commit in commits.items():
        for contents in rounds:
            if side not in contents:  # nothing was measured there
                here = machine.describe(torch.device("cpu"))
                contents[side] = store.content_of([], here, {}, processes=0)
            contents[side]["machine"] |= {"commit": commit, "dirty": False}
    return [(contents["base"], contents["head"]) for contents in rounds], rows


def _suites(asked: Sequence[str] | None, configured: config.Config) -> list[str]:
    """What is measured of two refs. Raises BadInput where another project says nothing."""
    found = list(dict.fromkeys(asked or configured.suites))
    top = machine.repository()
    if packages.is_ours(top):
        return [located(suite) for suite in found or [OURS]]
    if not found:
        raise BadInput(
            f'--suite: got none for {top}, needs --suite FILE.py, or suites = ["FILE.py"] under {TABLE} in its '
            "pyproject.toml (docs/ci.md of fused-ddpm shows one)"
        )
    for suite in found:
        if not is_file(suite):
            raise BadInput(f"--suite: {suite} measures fused-ddpm, which {top} is no checkout of, needs FILE.py")
    return [located(suite) for suite in found]


def _processes(asked: int | None, configured: config.Config) -> int:
    if asked is None and configured.processes is not None and configured.processes < LEAST_PROCESSES:
        raise BadInput(f"{configured.file}: {TABLE} processes: got {configured.processes}, needs >= {LEAST_PROCESSES}")
    return asked or configured.processes or PROCESSES


def _is_file(name: str) -> bool:
    return store.is_stored(name) or Path(name).is_file()


def _told_nothing(error: Exception, markdown: Path | None, json_file: Path | None) -> int:
    """Whatever it was, it must not look like a verdict: 1 says "slower"."""
    reason = one_line(error).removeprefix("WorkFailed: ")
    sys.stderr.write(f"error: {reason}\n")
    if markdown is not None:
        write_text(markdown, f"**Nothing was compared**: {reason}\n")
    if json_file is not None:
        head = {"format_version": store.FORMAT_VERSION, "kind": KIND, "exit": NOT_RUN}
        write_text(json_file, json_text(head | {"error": reason, "rows": []}))
    return NOT_RUN


def compare(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="a file of `run --processes`, or a git ref")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="the same kind")],
    suite: Annotated[
        list[str] | None, typer.Option(help=f"refs: as in `run`, or FILE.py, repeatable [{OURS}; elsewhere none]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick/--full", help="refs: as in `run`")] = True,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="refs: workloads whose name matches")] = "",
    processes: Annotated[
        int | None, typer.Option(min=LEAST_PROCESSES, help=f"refs: fresh processes a side [{PROCESSES}]")
    ] = None,
    build: Annotated[
        str | None,
        typer.Option(metavar="CMD", help='refs: run in each checkout, "" for nothing [its project\'s extensions]'),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1e-3, help=f"refs: seconds a process may take [{TIMEOUT:g}]")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help=f"what ratio is too much, 0.05 = 5% [{THRESHOLD:g}]")] = None,
    threshold_for: Annotated[list[str] | None, typer.Option(metavar="RE=X", help="its own for rows by name")] = None,
    too_noisy: Annotated[
        TooNoisy | None, typer.Option(help=f"whether rows that cannot be told end with exit code {TOO_NOISY} [pass]")
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="files: compare those of different machines or versions")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(metavar="F.md", help="write a table for a pull request")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="F.json", help="write the verdicts and samples")
    ] = None,
) -> int:
    """Is HEAD slower than BASE? Exit 0: no; 1: yes, a confirmed regression; 3: something did not run; 2: bad input.

    With --too-noisy fail 4: of some rows it cannot be told.
    What options do not say, [tool.ddpm-bench] in pyproject.toml may.
    """
    refuse_unwritable(markdown=markdown, json=json_file)
    if _is_file(base) != _is_file(head):
        raise BadInput(f"got {base} and {head}, needs two stored files or two git refs")
    others, needs = (OF_REFS, "two git refs") if _is_file(base) else (OF_FILES, "two stored files")
    odd = next((option for name, option in typed(context).items() if name in others), None)
    if odd is not None:
        raise BadInput(f"{odd}: got it with {base} and {head}, needs {needs}")
    configured = config.read(machine.repository())
    limit = threshold if threshold is not None else configured.threshold or THRESHOLD
    thresholds = Thresholds(limit, [*configured.rules, *(threshold_for or [])])
    try:
        if _is_file(base):
            rounds, found = compare_files(Path(base), Path(head), thresholds, across_machines)
        else:
            job = Job(
                _suites(suite, configured),
                quick,
                pattern,
                _processes(processes, configured),
                time_limit(timeout, configured.timeout),
                configured.build if build is None else build,
                configured=not suite and bool(configured.suites),
            )
            rounds, found = compare_refs(base, head, job, thresholds)
        code = verdicts.exit_code(found, too_noisy or configured.too_noisy or "pass")
        result = result_of(rounds, found, code)
        if markdown is not None:
            write_text(markdown, compare_markdown(result))
        if json_file is not None:
            store.write(json_file, result)
        compare_table(result)
    except BadInput:
        raise
    except Exception as error:
        return _told_nothing(error, markdown, json_file)
    return code
