"""`ddpm-bench ladder RUN`: an ablation, one optimisation at a time, time per step and quality beside each other.

eager -> folded -> tables -> shared -> channels_last -> winograd -> compile -> bf16 (-> graph, on CUDA): each has what
the one before has and one thing more, so the difference of two is what that one thing brings. Each is a rung in this
file and in records. Its pictures are judged here, over the whole trajectory; then its first TIMED_STEPS rows are timed
in fresh processes, beside eager.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench import store
from bench.machine import ROOT
from bench.measure import EAGER
from bench.registry import Bench, Workload
from bench.run import exit_code, measured, merged, refuse_unwritable, run_child
from bench.show import ladder_notes, ladder_plot, ladder_table
from bench.suites.networks import PARITY, judged, sampling_cost
from bench.timing import Call
from ddpm import load_run
from ddpm.commands.sampling_options import ALL, Solver, class_count, contexts_of, is_table_file, table_of
from ddpm.engines import unavailable_reason
from ddpm.engines.engine import FormOf
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import replacing, write_json
from ddpm.inference import FORMS, Layout, has_form, make_form
from ddpm.inference.context_unet import fold_batch_norm
from ddpm.metrics import distance, psnr
from ddpm.networks import NETWORKS
from ddpm.noise import PhiloxNoise
from ddpm.precision import computed_in
from ddpm.progress import Bar
from ddpm.runs import Run
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory
from kernels.philox import Stream
from kernels.winograd import missing as kernel_missing

# Five steps' noise of 32 samples is one draw of the fused engine, see `ddpm.noise.NOISE_BATCH_ELEMENTS`.
TIMED_STEPS = 5
ROUNDS, STEPS, SEED = 5, 50, 0
# Of fp32 on trained weights: DESIGN's bound beside eager's own distance from a float64 run.
TIMES_EAGER, SLACK = 4.0, 1e-6


@dataclass(frozen=True)
class Rung:
    """adds: what it has beyond the one before. engine: the name in `ddpm.engines` that the machine must be able to run.

    form: how its engine comes by the form. network: what is done to the network before. native: whether it is the
    operator `winograd`.
    """

    adds: str
    engine: str
    dtype: torch.dtype = torch.float32
    form: FormOf = make_form
    network: Callable[[nn.Module], nn.Module] = lambda model: model
    native: bool = False

    def missing(self, device: torch.device) -> str | None:
        """What this machine lacks to run it, or None."""
        if self.native and device.type != "cpu":
            return f"a CPU, the model is on {device}"
        lack = unavailable_reason(self.engine, device, self.dtype) or (kernel_missing() if self.native else None)
        if lack is None and computed_in(self.dtype, device) != self.dtype:  # engines take float32 in its place
            return "a CPU with AVX512-BF16 or AMX"
        return lack


def _laid_out(layout: Layout) -> FormOf:
    return lambda model, dtype: make_form(model, dtype, layout)


RUNGS = {
    EAGER: Rung("module, table, plain torch operators", "eager"),
    "folded": Rung("BatchNorm folded into its convolution", "eager", network=fold_batch_norm),
    "tables": Rung(
        "embeddings of time and context computed once a run; no concatenation before ConvTranspose; noise drawn ahead",
        "fused",
        form=_laid_out(Layout(channels_last=False, shared=False)),
    ),
    "shared": Rung(
        "guidance shares the encoder between its two halves", "fused", form=_laid_out(Layout(channels_last=False))
    ),
    "channels_last": Rung(
        "channels_last; on the CPU oneDNN's own layout for weights", "fused", form=_laid_out(Layout(winograd=False))
    ),
    "winograd": Rung("3x3 convolutions with a quarter of the products: engine `fused`", "fused", native=True),
    "compile": Rung("torch.compile of network, noise and update: engine `compile`", "compile"),
    "bf16": Rung("the network in bfloat16", "compile", torch.bfloat16),
    "graph": Rung("engine `fused` in bfloat16 as a CUDA graph: engine `graph`", "graph", torch.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Job:
    """What every rung has to do: sample `batch` images of a run, the classes in turn, with Philox noise of SEED."""

    run: Run
    table: StepTable
    batch: int
    guidance: float
    device: torch.device

    @property
    def head(self) -> StepTable:
        """The rows that are timed."""
        names = ("timesteps", "coefficients", "guidance_scale", "noise_steps", "begins")
        return replace(self.table, **{name: getattr(self.table, name)[:TIMED_STEPS] for name in names})

    def prepared(self, rung: Rung, table: StepTable, dtype: torch.dtype) -> Trajectory:
        """What a rung runs the table with, in its type or another."""
        model, guided = rung.network(self.run.model), self.guidance != 1.0
        return Trajectory(
            model, self.run.schedule, table, engine=rung.engine, dtype=dtype, guided=guided, form=rung.form
        )

    def call(self, rung: Rung, table: StepTable, exact: bool = False) -> Call:
        """A function without arguments that runs the table and returns float32 [batch, C, H, W].

        exact: computed in float64 throughout.
        """
        prepared = self.prepared(rung, table, torch.float64 if exact else rung.dtype)
        samples = torch.arange(self.batch, device=self.device)
        x = PhiloxNoise(SEED, prepared.state_dtype)(samples, 0, Stream.INITIAL, prepared.shape)
        context = contexts_of(self.run, ALL if class_count(self.run) else None, 0, self.batch)
        context = None if context is None else context.to(self.device)
        return partial(prepared, self.batch, context, self.guidance, SEED, batch_size=self.batch, x_T=x)


def workload(name: str, job: Job) -> Workload:
    """A rung beside eager in one process; its parity is of the steps that are timed."""

    def build(device: torch.device) -> Bench:
        reference = job.call(RUNGS[EAGER], job.head)
        candidates = judged(reference, {name: lambda: job.call(RUNGS[name], job.head)}, RUNGS[name].dtype)
        cost = sampling_cost(job.run.model, job.batch, len(job.head), job.guidance)
        return Bench([()], reference, candidates, cost, calls=len(job.head))

    return Workload(f"ladder/{name}", "ladder", build)


def _finite(value: float) -> float | None:
    """For a record: JSON has no infinity."""
    return value if math.isfinite(value) else None


def quality(names: list[str], job: Job, quiet: bool = False) -> dict[str, dict[str, Any]]:
    """rung -> {"to_eager", "to_float64", "psnr_db", "tolerance", "parity"} after the whole trajectory.

    Distances of pictures that are not finite are None. psnr_db is None where pictures are equal.
    fp32 must stay within the smaller of 1e-4 and four times eager's own distance from float64 plus 1e-6. For lower
    types there is no such bound (tolerance None): their timed steps have one, `ddpm evaluate` judges their samples.
    """
    eager, exact = job.call(RUNGS[EAGER], job.table)(), job.call(RUNGS[EAGER], job.table, exact=True)()
    bound = min(PARITY[torch.float32], TIMES_EAGER * distance(eager, exact) + SLACK)
    found = {}
    with Bar("quality", len(names), "trajectories/s", quiet=quiet) as bar:
        for name in names:
            images = eager if name == EAGER else job.call(RUNGS[name], job.table)()
            tolerance = bound if RUNGS[name].dtype == torch.float32 else None
            to_eager = distance(images, eager)
            found[name] = {
                "to_eager": _finite(to_eager),
                "to_float64": _finite(distance(images, exact)),
                "psnr_db": _finite(psnr(images, eager)),
                "tolerance": tolerance,
                "parity": math.isfinite(to_eager) and (tolerance is None or to_eager <= tolerance),
            }
            bar.update(len(found), name)
    return found


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
    options, steps_table = table_of(run, {"solver": solver, "steps": steps})
    run.model.to(device)
    return Job(run, steps_table, batch, guidance, device), options


def _timed_here(name: str, job: Job, rounds: int) -> store.Content:
    """One rung and eager in this process, interleaved, parity first."""
    if name not in RUNGS or name == EAGER:
        raise BadInput(f"--rung: got {name!r}, needs one of {', '.join(rung for rung in RUNGS if rung != EAGER)}")
    lack = RUNGS[name].missing(job.device)
    if lack is not None:
        raise BadInput(f"--rung: {name} needs {lack}")
    asked = {"seed": SEED, "suite": "ladder", "quick": False, "filter": name}
    return measured([workload(name, job)], job.device, rounds, math.inf, {}, True, **asked)


def _timed(names: list[str], processes: int, arguments: list[str], threads: int, quiet: bool) -> store.Content:
    """Fresh processes, one rung each; the rungs take turns, so that a busy hour does not fall on one of them."""
    contents = []
    with Bar("time", processes * len(names), "processes/s", quiet=quiet) as bar:
        for process in range(processes):
            for name in names:
                contents.append(run_child(ROOT, process, [*arguments, "--rung", name], "ladder", threads))
                bar.update(len(contents), name)
    return merged(contents) | {"processes": processes, "filter": ""}


def ladder(
    run: Annotated[Path, typer.Argument(help="folder of a run whose network has an inference form")],
    out: Annotated[Path, typer.Option(metavar="F.json", help="where the record goes")],
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    guidance: Annotated[float, typer.Option(help="w of classifier-free guidance, 1 = none")] = 2.0,
    solver: Solver = None,
    steps: Annotated[int | None, typer.Option(help=f"1..T [{STEPS}, or the table's]")] = None,
    processes: Annotated[int, typer.Option(min=1, help="fresh processes per optimisation")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="per process")] = ROUNDS,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="also draw it")] = None,
    rung: Annotated[str | None, typer.Option(help="time this optimisation alone, in this process")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, no table")] = False,
) -> int:
    """An ablation, one optimisation at a time: ms per step beside quality. Exit 1 if one crashed or lost parity."""
    refuse_unwritable(out=out, plot=picture)
    job, options = _job(run, batch, guidance, steps, solver)
    if rung is not None:
        content = _timed_here(rung, job, rounds)
        write_json(out, content)
        return exit_code(content)
    lacks = {name: found.missing(job.device) for name, found in RUNGS.items()}
    names = [name for name, lack in lacks.items() if lack is None]
    threads = torch.get_num_threads()

    judgements = quality(names, job, quiet)
    sound = [name for name in names if judgements[name]["parity"]]
    if sound == [EAGER]:
        raise WorkFailed("every optimisation lost parity with eager over the whole trajectory, nothing can be timed")
    # Children run in the checkout's root.
    arguments = [str(run.resolve()), "--batch", str(batch), "--guidance", str(guidance), "--rounds", str(rounds)]
    if is_table_file(solver):
        arguments += ["--solver", str(Path(solver).resolve())]
    else:
        arguments += ["--solver", options["solver"], "--steps", str(options["steps"])]
    content = _timed([name for name in sound if name != EAGER], processes, arguments, threads, quiet)
    content |= {
        "sampling": options | {"guidance": guidance, "batch": batch},
        "timed_steps": min(TIMED_STEPS, len(job.table)),
        "rungs": {name: found.adds for name, found in RUNGS.items()},
        "left_out": {name: lack for name, lack in lacks.items() if lack is not None},
        "quality": judgements,
    }
    content["parity"] = content["parity"] and len(sound) == len(names)
    write_json(out, content)
    if picture is not None:
        with replacing(picture) as partial_file:
            ladder_plot(content, partial_file)
    for name, lack in content["left_out"].items():
        print(f"note: {name} is left out, needs {lack}", file=sys.stderr)
    if not quiet:
        ladder_table(content).show(ladder_notes(content), width=160)
        print(f"wrote {out}")
    return exit_code(content)
