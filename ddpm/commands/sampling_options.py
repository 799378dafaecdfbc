"""Sampling options, which commands share: what they are called, the table they make, sampling with a progress bar."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from typer import Option

from ddpm import runs
from ddpm.data import ALL
from ddpm.distributed import World
from ddpm.engines import ENGINES
from ddpm.errors import BadInput, check_choice, check_integer, check_number
from ddpm.files import check_writable
from ddpm.networks.protocol import condition_shape, one_hot_conditions, sample_shape
from ddpm.progress import Bar
from ddpm.sampling import sample
from ddpm.solvers import SOLVERS, SPACINGS, given, make_table
from ddpm.table import StepTable
from ddpm.trajectory import check_room, chunk_size
from kernels import philox

# The options of `table_of`, for every command line that takes them.
Solver = Annotated[str | None, Option(help=f"{', '.join(SOLVERS)}, or a table FILE.json [the run's]")]
Steps = Annotated[int | None, Option(help="1..T [the run's]")]
Eta = Annotated[float | None, Option(help="noise of ddim, 0..1 [the run's]")]
Variance = Annotated[str | None, Option(help="posterior or beta, of ddpm [the run's]")]
Resample = Annotated[int | None, Option(help="times that ddpm makes each step, as RePaint does [the run's]")]
Corrections = Annotated[int | None, Option(help="Langevin steps after each step of pc [the run's]")]
Snr = Annotated[float | None, Option(help="size of pc's Langevin steps [the run's]")]
Clip = Annotated[float | None, Option(help="bound of x0, 0 = none [the run's]")]
Spacing = Annotated[str | None, Option(help=f"{', '.join(SPACINGS)}, leading+K [the run's]")]
Interval = Annotated[str | None, Option(metavar="LO,HI", help="shares of T between which guidance acts [0,1]")]
TABLE_OPTIONS = {"solver": Solver, "steps": Steps, "eta": Eta, "variance": Variance, "resample": Resample}
TABLE_OPTIONS |= {"corrections": Corrections, "snr": Snr, "clip": Clip, "spacing": Spacing}
TABLE_OPTIONS |= {"guidance_interval": Interval}
Command = TypeVar("Command", bound=Callable[..., Any])
Guidance = Annotated[float, Option(help="w of classifier-free guidance, 1 = none")]
Weights = Annotated[str, Option("--guidance", help="w of classifier-free guidance, 1 = none; w1,w2,..: one a sample")]
Negative = Annotated[str | None, Option(help="what guidance leads away from, as --context [no condition]")]
Rescale = Annotated[float, Option("--guidance-rescale", help="phi, 0..1: how far guidance keeps the output's spread")]
EngineName = Annotated[str, Option("--engine", help=f"auto, {', '.join(ENGINES)}")]
Precision = Annotated[str, Option(help="of the network: fp32, bf16 or fp16")]
Device = Annotated[str, Option(help="auto, cpu or cuda")]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def takes_table_options(command: Command) -> Command:
    """A command whose last parameter, `**asked`, are the options of `table_of`: a command line gets each by name."""
    *own, _ = inspect.signature(command).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    more = [inspect.Parameter(name, kind, default=None, annotation=of) for name, of in TABLE_OPTIONS.items()]
    command.__signature__ = inspect.Signature([*own, *more])
    return command


def check_output(path: Path | None, option: str, suffix: str) -> None:
    """Raise BadInput, before hours of work, if a file of this name could not be written."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise BadInput(f"{option}: got {path}, needs a file name ending in {suffix}")
    if _is_folder(path) or not _is_folder(path.parent):
        raise BadInput(f"{option}: cannot write {path}, needs a file in an existing folder")
    if path.name in runs.FILES and (path.parent / runs.CONFIG).exists():
        raise BadInput(f"{option}: got {path}, which is a run's own file, needs another name")
    _check_writable(path, option)


def check_output_folder(folder: Path, option: str) -> None:
    """Raise BadInput if files could not be written to this folder, which there need not be yet."""
    if not _is_folder(folder) and (os.path.lexists(folder) or not _is_folder(folder.parent)):
        raise BadInput(f"{option}: cannot write to {folder}, needs a folder, or a name in an existing one")
    _check_writable(folder / "0.png" if _is_folder(folder) else folder, option)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no name that the system takes
        return False


def _check_writable(path: Path, option: str) -> None:
    try:
        check_writable(path)
    except BadInput as error:
        raise BadInput(f"{option}: {error}, needs a place that can be written to") from error


def is_table_file(solver: object) -> bool:
    """Whether `--solver` names a stored table."""
    return isinstance(solver, str) and solver.endswith(".json")


def table_of(run: runs.Run, asked: dict[str, Any]) -> tuple[dict[str, Any], StepTable]:
    """(sampling options, their table) of a run, overridden where `asked` is not None (clip 0 = no clip).

    A solver that ends in .json is a stored table, which has its own options. Raises BadInput if it is for other weights
    or another schedule, ValueError for options that do not fit.
    """
    path, interval = (asked.get(name) for name in ("solver", "guidance_interval"))
    if isinstance(interval, str):
        asked = asked | {"guidance_interval": numbers_of("--guidance-interval", interval, "LO,HI, two shares of T")}
    if not is_table_file(path):
        options = run.options(**asked)
        if not options.get("clip"):
            options.pop("clip", None)
        return options, make_table(run.schedule, **options)
    for name, value in given(asked).items():
        if name != "solver":
            needs = "a table that has its own, needs one of the two"
            raise BadInput(f"--{name.replace('_', '-')}: got {value} beside --solver {path}, {needs}")
    table, prediction, own = StepTable.load(path), run.config["prediction"], run.schedule.config()
    if table.prediction != prediction:
        raise BadInput(f"{path}: is for networks that predict {table.prediction}, {run.folder} predicts {prediction}")
    schedule = table.made_for.get("schedule", own)
    if schedule != own:
        other = f"({_named(schedule)}), {run.folder} has ({_named(own)})"
        raise BadInput(f"{path}: was made for another noise schedule {other}")
    start = float(table.timesteps[0])
    if start > run.schedule.timesteps:
        raise BadInput(f"{path}: starts at timestep {start:g}, {run.folder} has {run.schedule.timesteps}")
    if table.weights is not None and table.weights != run.digest():
        raise BadInput(f"{path}: was learned for other weights than those of {run.folder}, needs a table for these")
    return {"solver": table.solver, "steps": table.steps, "prediction": table.prediction, "clip": table.clip}, table


def _named(schedule: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in schedule.items() if value is not None)[:200]


def class_count(run: runs.Run) -> int:
    """How many classes `--context all` goes through; 0 for a run without classes."""
    shape = condition_shape(run.model)
    return shape[0] if shape is not None and len(shape) == 1 else 0


def numbers_of(option: str, text: str, needs: str) -> list[float]:
    """Of what stands between commas. Raises BadInput."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option}: got {text!r}, needs {needs}") from None


def guided_by(
    run: runs.Run,
    n: int,
    first_sample: int,
    guidance: str,
    negative: str | None,
    rescale: float,
    interval: str | None,
) -> tuple[dict[str, Any], str]:
    """(what `sample` takes of guidance, what a caption says of it). Raises BadInput."""
    numbers = numbers_of("--guidance", guidance, "a number, or one for each sample")
    weights: Any = torch.tensor(numbers, dtype=torch.float64)
    if len(weights) not in (1, n):
        raise BadInput(f"--guidance: got {len(weights)} numbers, needs one, or {n}: one for each sample")
    guides, one = bool((weights != 1).any()), len(weights) == 1
    told = f", guidance {f'{weights[0]:g}' if one else guidance[:40]}" if guides else ""
    for option, value in (("negative", negative), ("guidance-interval", interval), ("guidance-rescale", rescale)):
        if value and not guides:
            raise BadInput(f"--{option}: got {value} without guidance, needs a --guidance other than 1")
        told += f", {option.removeprefix('guidance-')} {value}" if value else ""
    away = contexts_of(run, negative, first_sample, n, option="--negative")
    weights = weights.item() if one else weights
    return {"guidance": weights, "negative": away, "guidance_rescale": rescale}, told


def contexts_of(
    run: runs.Run, text: str | None, first_sample: int, n: int, count: str = "--n", option: str = "--context"
) -> Tensor | None:
    """[n, *condition_shape] of an option; `all` gives global sample k the class k % classes. count: n's option."""
    # Before there is a row of each.
    check_room(count, n, sample_shape(run.model), torch.device("cpu"))
    check_number("--first-sample", first_sample, 0, philox.SAMPLE_LIMIT - n, "0..2^56 - n")
    if text is None:
        return None
    if text == ALL and class_count(run):
        return one_hot_conditions(run.model, cycled_classes(run, first_sample, n))
    vector = run.context(text, option)
    return vector.expand(n, *vector.shape)


def cycled_classes(run: runs.Run, first_sample: int, n: int) -> Tensor:
    """The class of every sample under `--context all`: int64 [n]."""
    return torch.arange(first_sample, first_sample + n) % class_count(run)


def sample_run(
    run: runs.Run,
    n: int,
    context: Tensor | None,
    table: StepTable,
    world: World,
    *,
    first_sample: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    keep: bool = False,
    draw: Callable[..., Tensor] = sample,
    **more: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Samples [n, ...] of all ranks on the CPU, and with `keep` the x0 [n, ...] after each step that a GIF shows.

    draw: what makes them, called as `sample` is. more: for it; tensors are of all n samples.
    """
    if batch_size is not None:
        check_integer("--batch-size", batch_size)
    check_choice("--precision", precision, PRECISIONS)
    shape, part, steps = sample_shape(run.model), world.share(n), len(table)
    count = part.stop - part.start
    batch_size = batch_size or chunk_size(shape)
    done, start, total = 0, 0, steps * -(-count // batch_size)
    kept: dict[int, Tensor] = {}
    if keep:
        from ddpm.pictures import frames_of  # needs Pillow

        kept = {step: torch.empty(count, *shape) for step in frames_of(steps)}
    images = torch.zeros(0, *shape)
    with Bar("sample", total, "steps/s", quiet=not (world.is_main and count)) as bar:

        def callback(step: int, x0: Tensor) -> None:
            nonlocal done, start
            bar.update(min(done + step + 1, total))
            if step in kept:  # again, of fewer samples, after a chunk that ran out of memory
                kept[step][start : start + len(x0)] = x0
            if step == steps - 1:
                done += steps
                start += 0 if x0 is None else len(x0)

        callback.only_counts = not keep
        if count:
            more |= {"context": context, "first_sample": first_sample + part.start, "batch_size": batch_size}
            more = {name: value[part] if isinstance(value, Tensor) else value for name, value in more.items()}
            dtype = PRECISIONS[precision]
            images = draw(run.model, run.schedule, count, table=table, dtype=dtype, callback=callback, **more)
    return world.gather(images, n).cpu(), list(kept.values())
