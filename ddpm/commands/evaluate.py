"""`ddpm evaluate`: how good the samples of a run are, beside what real data gets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ddpm import evaluation, runs
from ddpm.commands.sampling_options import (
    ALL,
    EngineName,
    Solver,
    Steps,
    check_output,
    class_count,
    contexts_of,
    cycled_classes,
    sample_run,
    table_of,
)
from ddpm.distributed import World, pick_device
from ddpm.errors import BadInput
from ddpm.files import write_json
from ddpm.training import training_data


def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    n: Annotated[int, typer.Option(help="how many samples")] = 500,
    guidance: Annotated[float, typer.Option(help="w of classifier-free guidance, 1 = none")] = 1.0,
    solver: Solver = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="0 <= seed < 2^63")] = 0,
    data: Annotated[str | None, typer.Option(help="where the training data lies now [as trained]")] = None,
    labels: Annotated[str | None, typer.Option(help="where its labels lie now [as trained]")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
    engine: EngineName = "auto",
    precision: Annotated[str, typer.Option(help="of the network: fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Class accuracy by an independent classifier, and a Frechet distance between pixel features."""
    check_output(json, "--json", ".json")
    opened = runs.load_run(run)
    opened.model.to(pick_device(device))
    if n < 2:
        raise BadInput(f"--n: got {n}, needs at least 2 for a covariance")
    dataset = training_data(opened, data, labels)
    options, table = table_of(opened, {"solver": solver, "steps": steps})
    conditional = bool(class_count(opened))
    images, _ = sample_run(
        opened,
        n,
        contexts_of(opened, ALL, 0, n) if conditional else None,
        table,
        World(),
        guidance=guidance,
        seed=seed,
        engine=engine,
        precision=precision,
    )
    classes = cycled_classes(opened, 0, n) if conditional else None
    result = evaluation.evaluate(images, dataset, classes)
    how = f"{options['solver']}, {len(table)} steps, guidance {guidance:g}, {precision}"
    shown = Table(title=f"{run}: {n} samples, {how}")
    for heading in ("", "samples", "real data"):
        shown.add_column(heading, justify="left" if not heading else "right")
    shown.add_row("Frechet distance of pixel features", f"{result.frechet:.3f}", f"{result.frechet_real:.3f}")
    if result.accuracy is not None:
        shown.add_row("class accuracy (SVM)", f"{result.accuracy:.1%}", f"{result.accuracy_real:.1%}")
    Console().print(shown)
    if json is not None:
        settings = {"solver": options["solver"], "steps": len(table), "guidance": guidance, "seed": seed}
        settings["precision"] = precision
        write_json(json, settings | result.asdict())
        print(f"wrote {json}")
