"""`ddpm-bench ladder RUN`: judge every rung's pictures here, then time each in fresh processes beside eager."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import store
from bench.ladder import quality
from bench.ladder.rungs import EAGER, RUNGS, TIMED_STEPS, Job, workload
from bench.ladder.show import plot, print_ladder
from bench.machine import ROOT, describe
from bench.measure import matrix_ceiling, measure
from bench.memory import BATCH, sampling_memory
from bench.run import merged, run_child
from ddpm import load_run
from ddpm.command_line import FAILED
from ddpm.commands.drawing import Solver, class_count, is_table_file, table_of
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import replacing, write_json
from ddpm.fitting import training_data
from ddpm.inference import FORMS, has_form
from ddpm.networks import NETWORKS
from ddpm.precision import computed_in
from ddpm.progress import Bar

ROUNDS, STEPS = 5, 50
MEMORY_ENGINES = ("eager", "fused")


def _job(
    folder: Path, batch: int, guidance: float, steps: int | None = None, solver: str | None = None
) -> tuple[Job, dict[str, Any]]:
    """(what every rung has to do, its sampling options).

    Raises BadInput for a run whose network has no inference form, or guidance without classes.
    """
    run = load_run(folder)
    if not has_form(run.model):
        names = ", ".join(name for name, kind in NETWORKS.items() if kind in FORMS)
        raise BadInput(f"{folder}: is a run of {run.config['network']}, needs a network with a form ({names})")
    if not math.isfinite(guidance):
        raise BadInput(f"--guidance: got {guidance}, needs a finite number")
    if guidance != 1.0 and not class_count(run):
        raise BadInput(f"--guidance: got {guidance:g} for a run without classes, needs 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if steps is None and not is_table_file(solver):
        steps = STEPS
    options, table = table_of(run, {"solver": solver, "steps": steps})
    run.model.to(device)
    return Job(run, table, batch, guidance, device), options


def _timed_here(name: str, job: Job, rounds: int) -> store.Content:
    """One rung and eager in this process, interleaved, parity first."""
    if name not in RUNGS or name == EAGER:
        raise BadInput(f"--rung: got {name!r}, needs one of {', '.join(rung for rung in RUNGS if rung != EAGER)}")
    lack = RUNGS[name].missing(job.device)
    if lack is not None:
        raise BadInput(f"--rung: {name} needs {lack}")
    ceiling = matrix_ceiling(job.device)
    records = measure(workload(name, job), job.device, rounds, math.inf, ceiling)
    return store.content_of(
        [{"process": 0} | record for record in records],
        describe(job.device),
        {},
        seed=job.seed,
        suite="ladder",
        quick=False,
        filter=name,
        processes=1,
        product_flops_per_s=ceiling,
    )


def _timed(names: list[str], processes: int, arguments: list[str], threads: int, quiet: bool) -> store.Content:
    """Fresh processes, one rung each; the rungs take turns, so that a busy hour does not fall on one of them."""
    contents = []
    with Bar("time", processes * len(names), "processes/s", quiet=quiet) as bar:
        for process in range(processes):
            for name in names:
                contents.append(run_child(ROOT, process, [*arguments, "--rung", name], "ladder", threads))
                bar.update(len(contents), name)
    return merged(contents) | {"processes": processes, "filter": ""}


def _memory(folder: Path, threads: int, processes: int, quiet: bool) -> dict[str, Any]:
    """Peak memory of sampling per engine, of each process: they differ by 5%. Nothing where it cannot be read."""
    engines: dict[str, list[dict[str, int]]] = {engine: [] for engine in MEMORY_ENGINES}
    with Bar("memory", processes * len(engines), "processes/s", quiet=quiet) as bar:
        for process in range(processes):
            for done, (engine, found) in enumerate(engines.items(), start=1):
                measured = sampling_memory(folder, engine, threads)
                found.extend([] if measured is None else [measured])
                bar.update(process * len(engines) + done, engine)
    return {"batch": BATCH, "engines": engines}


def ladder(
    run: Annotated[Path, typer.Argument(help="folder of a run whose network has an inference form")],
    out: Annotated[Path, typer.Option(metavar="F.json", help="where the record goes")],
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    guidance: Annotated[float, typer.Option(help="w of classifier-free guidance, 1 = none")] = 2.0,
    solver: Solver = None,
    steps: Annotated[int | None, typer.Option(help=f"1..T [{STEPS}, or the table's]")] = None,
    processes: Annotated[int, typer.Option(min=1, help="fresh processes per rung")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="per process")] = ROUNDS,
    data: Annotated[Path | None, typer.Option(help="the training data: also evaluate fp32 and bf16")] = None,
    labels: Annotated[Path | None, typer.Option(help="its labels")] = None,
    n: Annotated[int, typer.Option(min=2, help="samples per evaluation")] = 200,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="also draw it")] = None,
    rung: Annotated[str | None, typer.Option(help="time this rung alone, in this process")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, no table")] = False,
) -> int:
    """One optimisation at a time: ms per step beside quality. Exit 1 if a rung crashed or lost parity."""
    for option, path in (("--out", out), ("--plot", picture)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise BadInput(f"{option}: {path} cannot be written, needs a file in a folder that exists")
    job, options = _job(run, batch, guidance, steps, solver)
    if rung is not None:
        content = _timed_here(rung, job, rounds)
        write_json(out, content)
        return 0 if content["parity"] and not content["failed"] else FAILED
    moved = None if labels is None else str(labels)
    dataset = None if data is None else training_data(job.run, str(data), moved)
    lacks = {name: found.missing(job.device) for name, found in RUNGS.items()}
    names = [name for name, lack in lacks.items() if lack is None]
    threads = torch.get_num_threads()

    judged = quality.judge(names, job, quiet)
    evaluation = {}
    if dataset is not None:
        total = sum(name in names for name, _ in quality.JUDGED.values()) * -(-n // batch) * len(job.table)
        with Bar("evaluate", total, "steps/s", quiet=quiet) as bar:
            evaluation = quality.evaluated(names, job, dataset, n, bar.update)
    sound = [name for name in names if judged[name]["parity"]]
    if sound == [EAGER]:
        raise WorkFailed("every rung lost parity with eager over the whole trajectory, there is nothing to time")
    # Children run in the checkout's root.
    arguments = [str(run.resolve()), "--batch", str(batch), "--guidance", str(guidance)]
    arguments += ["--rounds", str(rounds)]
    if is_table_file(solver):
        arguments += ["--solver", str(Path(solver).resolve())]
    else:
        arguments += ["--solver", options["solver"], "--steps", str(options["steps"])]
    content = _timed([name for name in sound if name != EAGER], processes, arguments, threads, quiet)
    content |= {
        "sampling": options | {"guidance": guidance, "batch": batch},
        "timed_steps": min(TIMED_STEPS, len(job.table)),
        "bfloat16_in_hardware": computed_in(torch.bfloat16, job.device) == torch.bfloat16,
        "rungs": {name: found.adds for name, found in RUNGS.items()},
        "left_out": {name: lack for name, lack in lacks.items() if lack is not None},
        "quality": judged,
        "evaluation": evaluation,
        "memory": _memory(run, threads, processes, quiet) if job.device.type == "cpu" else None,
    }
    content["parity"] = content["parity"] and len(sound) == len(names)
    write_json(out, content)
    if picture is not None:
        with replacing(picture) as partial:
            plot(content, partial)
    for name, lack in content["left_out"].items():
        print(f"note: rung {name} is left out, needs {lack}", file=sys.stderr)
    if not quiet:
        print_ladder(content)
        print(f"wrote {out}")
    return 0 if content["parity"] and not content["failed"] else FAILED
