"""`ddpm-bench run`: measure the registry and store what was measured."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import packages, store
from bench.machine import ROOT, describe
from bench.measure import convolution_ceiling, matrix_ceiling, measure
from bench.registry import SUITES, Workload, is_file, located, seed_of, selected
from bench.show import run_table
from ddpm.command_line import FAILED, debugging
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import write_json
from ddpm.progress import Bar

# Without the working directory before PYTHONPATH: it may have a folder bench/ of its own.
PYTHON = (sys.executable, "-P")
ROUNDS = 60
# Per workload, whichever ends first; the largest CPU workloads then do three rounds.
SECONDS, QUICK_SECONDS = 30.0, 2.0
# glibc's allocator: give nothing back to the system. Other allocators ignore it.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 26)}


def measured(
    workloads: Sequence[Workload],
    device: torch.device,
    rounds: int,
    seconds: float,
    skipped: Mapping[str, str],
    quiet: bool,
    **asked: Any,
) -> store.Content:
    """The content of a file: these workloads, measured in this process. rounds, seconds: see `measure`.

    Each record of a good row has its share of the convolution rate, the best seen just before and after its workload.
    """
    ceiling, records = matrix_ceiling(device), []
    with Bar("bench", len(workloads), "workloads/s", quiet=quiet) as bar:
        for done, workload in enumerate(workloads, start=1):
            before = convolution_ceiling(device)
            found = measure(workload, device, rounds, seconds, ceiling)
            rate = max(before, convolution_ceiling(device)).flops_per_s
            for record in filter(store.is_good, found):
                record |= {"share_of_convolution": record["flops_per_s"] / rate, "convolution_flops_per_s": rate}
            records += [{"process": 0} | record for record in found]
            bar.update(done, workload.name)
    return store.content_of(records, describe(device), skipped, **asked, processes=1, product_flops_per_s=ceiling)


def run_here(suite: str, quick: bool, pattern: str, rounds: int | None, quiet: bool = False) -> store.Content:
    """Measure the selected workloads in this process, on CUDA where there is one."""
    workloads, skipped = selected(suite, quick, pattern)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = math.inf if rounds else (QUICK_SECONDS if quick else SECONDS)
    asked = {"seed": seed_of(suite, workloads), "suite": suite, "quick": quick, "filter": pattern}
    return measured(workloads, device, rounds or ROUNDS, seconds, skipped, quiet, **asked)


def environment(paths: Sequence[Path], threads: int = 1, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with these folders before all others in the import path, so many threads, and `extra`.

    One thread, because processor time of several counts those that spin while they wait for one that lost its
    processor; wall times, as the figures of `step` and the ladder are, may take more. With one, memory stays with the
    process, for which the page faults of operators with large temporaries do not vary: the gating ratio of q_sample
    spread by 6% over six processes instead of 38%, that of solver_step by 5% instead of 28%.
    """
    count = str(threads)
    kept = KEPT if threads == 1 else {}
    # As users run it: a benchmark of Triton's interpreter is of no use to anybody.
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TRITON_INTERPRET": "0"}
    return os.environ | kept | fixed | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | (extra or {})


def run_child(
    folder: Path,
    process: int,
    arguments: list[str],
    *,
    paths: Sequence[Path],
    extra: Mapping[str, str] | None = None,
    command: str = "run",
    threads: int = 1,
    timeout: float | None = None,
    on_row: Callable[[str], None] | None = None,
    side: str = "",
) -> store.Content:
    """`ddpm-bench run` (or another command with --quiet and --out) in a process of its own, in this folder.

    paths, extra: see `environment`. timeout: seconds. on_row: is told each row as the process begins it. side: "base"
    or "head", which its errors begin with. Its records are numbered `process`; what it writes to stderr is shown under
    --debug. Raises BadInput for its exit code 2 and WorkFailed if it ended without a file: a crashed process is never
    silent.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as temporary:
        out = Path(temporary) / "run.json"
        line = [*PYTHON, "-m", "bench", command, *arguments, "--quiet", "--out", str(out)]
        done = subprocess.run(  # noqa: S603
            line, cwd=folder, env=environment(paths, threads, extra), capture_output=True, text=True, check=False
        )
        if debugging():
            sys.stderr.write(done.stderr)
        if done.returncode not in (0, FAILED) or not out.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1].removeprefix("error: ") if lines else f"exit code {done.returncode}"
            raise (BadInput if done.returncode == 2 else WorkFailed)(reason)
        content = store.load(out)
    for record in content["records"]:
        record["process"] = process
    return content


def merged(contents: list[store.Content]) -> store.Content:
    """One content from several processes' contents."""
    first = contents[0]
    records = [record for content in contents for record in content["records"]]
    asked = {key: first.get(key) for key in ("seed", "suite", "quick", "filter", "product_flops_per_s")}
    return store.content_of(records, first["machine"], first["skipped"], **asked, processes=len(contents))


def refuse_unwritable(**outputs: Path | None) -> None:
    """Raise BadInput, before anything is measured, if an option's file could not be written; None was not given."""
    for option, path in outputs.items():
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise BadInput(f"--{option}: {path} cannot be written, needs a file in a folder that exists")


def exit_code(content: store.Content) -> int:
    """Of a command that measured: 1 if anything crashed or lost parity."""
    return 0 if content["parity"] and not content["failed"] else FAILED


def run(
    out: Annotated[Path, typer.Option(metavar="F.json", help="where the records go")],
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}, all or FILE.py")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="fewer workloads and rounds")] = False,
    pattern: Annotated[str, typer.Option("--filter", metavar="RE", help="workloads whose name matches")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds per workload, however long they take")] = None,
    processes: Annotated[int, typer.Option(min=1, help="repeat in so many fresh processes (for `compare`: 6)")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="of each process [PyTorch's; 1 with --processes]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, no table")] = False,
) -> int:
    """Measure the eager references and their candidates, parity first; exit 1 if anything crashed or lost parity."""
    refuse_unwritable(out=out)
    suite = located(suite)
    if processes == 1:
        torch.set_num_threads(threads or torch.get_num_threads())
        content = run_here(suite, quick, pattern, rounds, quiet)
    else:
        selected(suite, quick, pattern)
        arguments = ["--suite", suite, "--filter", pattern, *(["--quick"] if quick else [])]
        arguments += [] if rounds is None else ["--rounds", str(rounds)]
        contents = []
        theirs = is_file(suite)  # which imports what lies here
        root = Path.cwd() if theirs else ROOT
        with (
            packages.runner() if theirs else nullcontext() as ours,
            Bar("bench", processes, "processes/s", quiet=quiet) as bar,
        ):
            for process in range(processes):
                paths = [path for path in (ours, root, root / "src") if path is not None]
                contents.append(run_child(root, process, arguments, paths=paths, threads=threads or 1))
                bar.update(process + 1)
        content = merged(contents)
    write_json(out, content)
    for reason in content["skipped"].values():
        print(f"note: {reason}", file=sys.stderr)
    if not quiet:
        table, wrong = run_table(content)
        table.show(wrong, "red bold")
        print(f"wrote {out}")
    return exit_code(content)
