"""`ddpm-bench run`: measure the registry and store what was measured."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import config, machine, packages, provenance, store
from bench.children import TIMEOUT, Running, run_child, time_limit
from bench.machine import ROOT, describe
from bench.measure import convolution_ceiling, matrix_ceiling, measure
from bench.registry import SUITES, Workload, check_suites, expression_of, seed_of, selected
from bench.suite_files import import_folders, is_file, located
from ddpm.command_line import FAILED
from ddpm.errors import BadInput
from ddpm.files import check_writable
from ddpm.progress import Bar

# Quick: of rows of 5 to 20 ms (EPYC) 15 rounds had a median 0.4 to 1.6% off that of 30; processes differ by 1 to 6%.
ROUNDS, QUICK_ROUNDS = 60, 20
# Per workload, whichever ends first; the largest CPU workloads then do three rounds.
SECONDS, QUICK_SECONDS = 30.0, 2.0


def measured(
    workloads: Sequence[Workload],
    device: torch.device,
    rounds: int,
    seconds: float,
    skipped: Mapping[str, str],
    quiet: bool,
    ceilings: bool = True,
    **asked: Any,
) -> store.Content:
    """The content of a file: these workloads, measured in this process. rounds, seconds: see `measure`.

    ceilings: whether each record of a good row has its share of the rate of products, and of convolutions, the best
    seen just before and after its workload. They are a sixth of the time of a process that measures for `compare`.
    """
    load, ceiling, records = machine.Load(), matrix_ceiling(device) if ceilings else None, []
    with Bar("bench", len(workloads), "workloads/s", quiet=quiet) as bar:
        for done, workload in enumerate(workloads, start=1):
            before = convolution_ceiling(device) if ceilings else None
            found = measure(workload, device, rounds, seconds, ceiling)
            rate = max(before, convolution_ceiling(device)).flops_per_s if ceilings else None
            for record in filter(store.is_good, found if ceilings else ()):
                record |= {"share_of_convolution": record["flops_per_s"] / rate, "convolution_flops_per_s": rate}
            records += [{"process": 0} | record for record in found]
            bar.update(done, workload.name)
    where = describe(device) | {"load": load.record()}
    return store.content_of(records, where, skipped, **asked, processes=1, product_flops_per_s=ceiling)


def run_here(
    suites: str | Sequence[str],
    quick: bool,
    pattern: str,
    rounds: int | None,
    quiet: bool = False,
    ceilings: bool = True,
) -> store.Content:
    """Measure the selected workloads in this process, on CUDA where there is one."""
    workloads, skipped = selected(suites, quick, pattern)
    provenance.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = math.inf if rounds else (QUICK_SECONDS if quick else SECONDS)
    suite = suites if isinstance(suites, str) else ", ".join(suites)
    asked = {"seed": seed_of(suites, workloads), "suite": suite, "quick": quick, "filter": pattern}
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    content = measured(workloads, device, rounds, seconds, skipped, quiet, ceilings, **asked)
    provenance.check()
    return content


def suite_arguments(suites: Sequence[str]) -> list[str]:
    """The options that name these suites."""
    return [word for suite in suites for word in ("--suite", suite)]


def _run_apart(
    suites: list[str], arguments: list[str], processes: int, threads: int, timeout: float, quiet: bool
) -> store.Content:
    """`run` with these arguments in so many fresh processes, which import what this one would."""
    theirs = [Path(suite) for suite in suites if is_file(suite)]
    folders = [folder for suite in theirs for folder in import_folders(suite)] or [ROOT]
    contents = []
    with (
        packages.runner() if theirs else nullcontext() as ours,
        Bar("bench", processes, "processes/s", quiet=quiet) as bar,
    ):
        how = {"paths": [ours, *folders] if theirs else folders, "threads": threads, "timeout": timeout}
        running = Running(bar)
        for process in range(processes):
            contents.append(run_child(Path.cwd() if theirs else ROOT, process, arguments, on_row=running.of(), **how))
            running.ended()
    return merged(contents)


def merged(contents: list[store.Content]) -> store.Content:
    """One content from several processes' contents."""
    first = contents[0]
    records = [record for content in contents for record in content["records"]]
    asked = {key: first.get(key) for key in ("seed", "suite", "quick", "filter", "product_flops_per_s")}
    where = first["machine"] | {"load": machine.overall([content["machine"].get("load") for content in contents])}
    return store.content_of(records, where, first["skipped"], **asked, processes=len(contents))


def refuse_unwritable(**outputs: Path | None) -> None:
    """Raise BadInput, before anything is measured, if an option's file could not be written; None was not given."""
    for option, path in outputs.items():
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise BadInput(f"--{option}: {path} cannot be written, needs a file in a folder that exists")
        if path is not None:
            check_writable(path)


def exit_code(content: store.Content) -> int:
    """Of a command that measured: 1 if anything crashed or lost parity."""
    return 0 if content["parity"] and not content["failed"] else FAILED


def run(
    out: Annotated[
        Path, typer.Option(metavar="F.jsonl", help="where the records go: JSON Lines, or an object in F.json")
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SUITES)}, all or FILE.py; repeatable [pyproject.toml's suites, or all]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer workloads and rounds")] = False,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="workloads whose name matches")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds per workload, however long they take")] = None,
    processes: Annotated[int, typer.Option(min=1, help="repeat in so many fresh processes (for `compare`: 6)")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="of each process [PyTorch's; 1 with --processes]")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1e-3, help=f"seconds a process may take, with --processes [{TIMEOUT:g}]")
    ] = None,
    ceilings: Annotated[
        bool, typer.Option("--ceilings/--no-ceilings", help="measure the machine's best rates too, for the shares")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, no table")] = False,
) -> int:
    """Measure the eager references and their candidates, parity first; exit 1 if anything crashed or lost parity."""
    refuse_unwritable(out=out)
    if timeout is not None and processes == 1:
        raise BadInput("--timeout: ends processes of --processes, needs that option")
    configured = config.read(machine.repository()) if processes > 1 or suite is None else config.Config()
    suites = [located(name) for name in suite or configured.suites or ["all"]]
    check_suites(suites)
    expression_of(pattern)
    if processes == 1:
        torch.set_num_threads(threads or torch.get_num_threads())
        content = run_here(suites, quick, pattern, rounds, quiet, ceilings)
    else:
        arguments = [*suite_arguments(suites), "--filter", pattern, *(["--quick"] if quick else [])]
        arguments += [] if rounds is None else ["--rounds", str(rounds)]
        arguments += [] if ceilings else ["--no-ceilings"]
        limit = time_limit(timeout, configured.timeout)
        content = _run_apart(suites, arguments, processes, threads or 1, limit, quiet)
    store.write(out, content)
    if not quiet:
        machine.warn(machine.warning_of((content["machine"]["load"] or {}).get("others")))
    for reason in content["skipped"].values():
        print(f"note: {reason}", file=sys.stderr)
    if not quiet:
        from bench.show import run_table  # not for the processes of others, which are quiet

        table, wrong = run_table(content)
        table.show(wrong, "red bold")
        print(f"wrote {out}")
    return exit_code(content)
