"""What `ddpm sample` and `ddpm evaluate` share: opening a run, reading its options, drawing with a progress bar."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ddpm import runs
from ddpm.distributed import World
from ddpm.errors import BadInput
from ddpm.progress import Bar
from ddpm.sampling import chunk_size, sample
from ddpm.solvers import StepTable, make_table

ALL = "all"
# The options of `table_of`, as every command line that takes them says them.
Solver = Annotated[str | None, typer.Option(help="ddpm, ddim or dpmpp_2m [the run's]")]
Steps = Annotated[int | None, typer.Option(help="1..T [the run's]")]
Eta = Annotated[float | None, typer.Option(help="noise of ddim, 0..1 [the run's]")]
Variance = Annotated[str | None, typer.Option(help="posterior or beta, of ddpm [the run's]")]
Clip = Annotated[float | None, typer.Option(help="bound of x0, 0 = none [the run's]")]
Spacing = Annotated[str | None, typer.Option(help="trailing, leading or linspace [the run's]")]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_output(path: Path | None, option: str, suffix: str) -> None:
    """Raise BadInput, before hours of work, if a file of this name could not be written."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise BadInput(f"{option}: got {path}, needs a file name ending in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"{option}: cannot write {path}, needs a file in an existing folder")


def table_of(run: runs.Run, asked: dict[str, Any]) -> tuple[dict[str, Any], StepTable]:
    """The run's sampling options, overridden where `asked` is not None (clip 0 = no clip), and their table."""
    options = run.sampling | {name: value for name, value in asked.items() if value is not None}
    options["clip"] = options["clip"] or None
    return options, make_table(run.schedule, **options)


def contexts_of(run: runs.Run, text: str | None, first_sample: int, n: int) -> Tensor | None:
    """[n, n_cfeat] for `--context`; `all` gives global sample k the class k % n_cfeat."""
    if text is None:
        return None
    if text == ALL and run.model.n_cfeat:
        return torch.eye(run.model.n_cfeat)[cycled_classes(run, first_sample, n)]
    return run.context(text).expand(n, -1)


def cycled_classes(run: runs.Run, first_sample: int, n: int) -> Tensor:
    """The class of every sample under `--context all`: int64 [n]."""
    return torch.arange(first_sample, first_sample + n) % run.model.n_cfeat


def draw(
    run: runs.Run,
    n: int,
    context: Tensor | None,
    options: dict[str, Any],
    table: StepTable,
    world: World,
    *,
    first_sample: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    keep: bool = False,
    **more: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Samples [n, ...] of all ranks on the CPU, and with `keep` the x0 after every step: S tensors [n, ...].

    options, table: as `table_of` returned them.
    """
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"--batch-size: got {batch_size}, needs an integer >= 1")
    if precision not in PRECISIONS:
        raise BadInput(f"--precision: got {precision!r}, needs one of {', '.join(PRECISIONS)}")
    shape = run.model.sample_shape
    part = world.share(n)
    count = part.stop - part.start
    batch_size = batch_size or chunk_size(shape)
    steps = len(table)
    estimates: list[list[Tensor]] = [[] for _ in range(steps)]
    chunk: list[Tensor] = []
    done = 0
    total = steps * -(-count // batch_size)
    images = torch.zeros(0, *shape)
    with Bar("sample", max(total, 1), "steps/s", quiet=not (world.is_main and count)) as bar:

        def callback(step: int, x0: Tensor) -> None:
            nonlocal done
            done += 1
            bar.update(min(done, total))
            if not keep:
                return
            if step == 0:  # of the next chunk, or again of one that ran out of memory
                chunk.clear()
            chunk.append(x0.cpu().clone())
            if step == steps - 1:
                for parts, estimate in zip(estimates, chunk, strict=True):
                    parts.append(estimate)

        if count:
            images = sample(
                run.model,
                run.schedule,
                count,
                context=None if context is None else context[part],
                first_sample=first_sample + part.start,
                batch_size=batch_size,
                dtype=PRECISIONS[precision],
                callback=callback,
                **options,
                **more,
            )
    return world.gather(images, n).cpu(), [torch.cat(parts) for parts in estimates] if keep else []
