"""`ddpm-bench compare BASE HEAD`: is head slower than base? Two stored files, or two git refs measured here and now."""

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench import machine, packages, sides, store, verdicts
from bench.measure import one_line
from bench.registry import is_file, located, selected
from bench.show import compare_markdown, compare_table
from bench.verdicts import LEAST_PROCESSES, NOT_RUN, THRESHOLD, Thresholds, Verdict
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import json_text, write_text

KIND = "fused-ddpm comparison"
PROCESSES = 8
FIRST_ROUND, SECOND_ROUND = 0, 1
# Processes of the second round, which decides, as a multiple of the first's: as many again missed two of ten planted
# 10% on a busy machine. There is one only where something is suspected, and it runs the suspects alone.
AGAIN = 2


def _is_file(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def compare_files(base: Path, head: Path, thresholds: Thresholds) -> tuple[dict, dict, list[Verdict]]:
    """Verdicts on two stored files, which were not interleaved: drift between them looks like a change."""
    contents = store.load(base), store.load(head)
    verdicts.comparable(*contents)
    print("note: stored files were not measured side by side; what the machine did in between counts", file=sys.stderr)
    return *contents, verdicts.judge(*contents, thresholds)


def compare_refs(
    base: str, head: str, suite: str, quick: bool, pattern: str, processes: int, thresholds: Thresholds
) -> tuple[dict, dict, list[Verdict]]:
    """Verdicts on two git refs; rows beyond their threshold are measured once more, in more processes."""
    suite = located(suite)  # one file for both sides
    if not is_file(suite) and not packages.is_ours(machine.repository()):
        raise BadInput(
            f"--suite: {suite} measures fused-ddpm, which {machine.repository()} is no checkout of, needs FILE.py"
        )
    commits = {"base": sides.commit_of(base), "head": sides.commit_of(head)}
    sides.refuse_dirty()
    selected(suite, quick, pattern)
    options = ["--quick"] if quick else []
    with sides.checkouts(*commits.values(), suite, quick, pattern) as found_there:
        arguments = ["--suite", suite, "--filter", pattern, *options]
        contents = sides.measure_sides(found_there, processes, arguments, "compare", FIRST_ROUND)
        found = verdicts.judge(*contents.values(), thresholds)
        suspects = verdicts.suspects(found)
        if suspects:
            names = sorted({re.escape(row.partition(" ")[0]) for row in suspects})
            arguments = ["--suite", suite, "--filter", f"^({'|'.join(names)})$", *options]
            again = sides.measure_sides(found_there, AGAIN * processes, arguments, "confirm", SECOND_ROUND)
            found = verdicts.confirmed(found, verdicts.judge(*again.values(), thresholds))
    found += [Verdict(name, "missing", detail="base has this benchmark, head has not") for name in found_there.gone]
    for side, content in contents.items():
        content["machine"] |= {"commit": commits[side], "dirty": False}
    return contents["base"], contents["head"], found


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="a file of `run --processes`, or a git ref")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="the same kind")],
    suite: Annotated[str, typer.Option(help="refs: as in `run`, or a suite of your own, FILE.py")] = "kernels",
    quick: Annotated[bool, typer.Option("--quick/--full", help="refs: as in `run`")] = True,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="refs: workloads whose name matches")] = "",
    processes: Annotated[int, typer.Option(min=LEAST_PROCESSES, help="refs: fresh processes a side")] = PROCESSES,
    threshold: Annotated[float, typer.Option(help="what ratio is too much, 0.05 = 5%")] = THRESHOLD,
    threshold_for: Annotated[list[str] | None, typer.Option(metavar="RE=X", help="its own for rows by name")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="F.md", help="write a table for a pull request")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="F.json", help="write the verdicts")] = None,
) -> int:
    """Is HEAD slower than BASE? Exit 0: no; 1: yes, a confirmed regression; 3: something did not run; 2: bad input."""
    thresholds = Thresholds(threshold, threshold_for or [])
    outputs = [path for path in (markdown, json_file) if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            raise BadInput(f"{path}: its folder does not exist, needs one that does")
    if _is_file(base) != _is_file(head):
        raise BadInput(f"got {base} and {head}, needs two stored files or two git refs")
    try:
        if _is_file(base):
            before, after, found = compare_files(Path(base), Path(head), thresholds)
        else:
            before, after, found = compare_refs(base, head, suite, quick, pattern, processes, thresholds)
    except BadInput:
        raise
    except Exception as error:  # whatever it was, it must not look like a verdict: 1 says "slower"
        reason = one_line(error)
        if isinstance(error, WorkFailed):
            reason = reason.removeprefix("WorkFailed: ")
        sys.stderr.write(f"error: {reason}\n")
        if markdown is not None:
            write_text(markdown, f"**Nothing was compared**: {reason}\n")
        return NOT_RUN
    code = verdicts.exit_code(found)
    result = {
        "format_version": store.FORMAT_VERSION,
        "kind": KIND,
        "base": {key: before[key] for key in ("machine", "processes", "date")},
        "head": {key: after[key] for key in ("machine", "processes", "date")},
        "exit": code,
        "rows": [asdict(verdict) for verdict in found],
    }
    texts = {markdown: compare_markdown(result), json_file: json_text(result)}
    for path in outputs:
        write_text(path, texts[path])
    compare_table(result)
    return code
