"""`ddpm evaluate`: how good the samples of a run are, beside what real data gets."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ddpm import evaluation, runs
from ddpm.commands import sampling_options as given
from ddpm.data import held_out
from ddpm.distributed import World, pick_device
from ddpm.errors import BadInput
from ddpm.extras import need
from ddpm.files import write_json
from ddpm.networks.protocol import one_hot_conditions, sample_shape
from ddpm.training import training_data
from ddpm.trajectory import check_room


@given.takes_table_options
def evaluate(
    run: Annotated[Path, Argument(help="run folder")],
    n: Annotated[int, Option(help="how many samples")] = 500,
    guidance: given.Guidance = 1.0,
    guidance_rescale: given.Rescale = 0.0,
    seed: Annotated[int, Option(help="0 <= seed < 2^63")] = 0,
    data: Annotated[str | None, Option(help="where the training data lies now [as trained]")] = None,
    labels: Annotated[str | None, Option(help="where its labels lie now [as trained]")] = None,
    json: Annotated[Path | None, Option(help="also write the figures to this file")] = None,
    engine: given.EngineName = "auto",
    precision: given.Precision = "fp32",
    device: given.Device = "auto",
    **asked: Any,
) -> None:
    """Class accuracy by an independent classifier, and a Frechet distance between pixel features."""
    given.check_output(json, "--json", ".json")
    opened = runs.load_run(run)
    opened.model.to(pick_device(device))
    if n < 2:
        raise BadInput(f"--n: got {n}, needs at least 2 for a covariance")
    check_room("--n", n, sample_shape(opened.model), torch.device("cpu"))  # before there is a class of each
    dataset = training_data(opened, data, labels)
    options, table = given.table_of(opened, asked)
    classes = contexts = None
    if dataset.has_classes:
        need("sklearn")
        present = dataset.labels.any(dim=0).nonzero().flatten()
        classes = present[torch.arange(n) % len(present)]
        contexts = one_hot_conditions(opened.model, classes)
    elif dataset.labels is not None:
        contexts = dataset.labels[torch.arange(n) % len(dataset)]
    asked_of_guidance = {"guidance_rescale": guidance_rescale, "guidance_interval": asked["guidance_interval"]}
    guided, _ = given.guided_by(opened, n, 0, str(guidance), None, *asked_of_guidance.values())
    more = guided | {"seed": seed, "engine": engine, "precision": precision}
    images, _ = given.sample_run(opened, n, contexts, table, World(), **more)
    result = evaluation.evaluate(images, dataset, classes, quiet=False, held_out=held_out(dataset.name))
    how = f"{options['solver']}, {table.steps} steps, guidance {guidance:g}, {precision}"
    name = str(run).encode(errors="replace").decode()  # as Text: square brackets are no markup
    shown = Table("", title=Text(f"{name}: {n} samples, {how}", style="italic"))
    for heading in ("samples", "real data"):
        shown.add_column(heading, justify="right")
    shown.add_row("Frechet distance of pixel features", f"{result.frechet:.3f}", f"{result.frechet_real:.3f}")
    if result.accuracy is not None:
        shown.add_row("class accuracy (SVM)", f"{result.accuracy:.1%}", f"{result.accuracy_real:.1%}")
    if result.energy is not None:
        shown.add_row("energy distance to held-out points", f"{result.energy:.4f}", f"{result.energy_real:.4f}")
    Console().print(shown)
    if json is not None:
        settings = {"solver": options["solver"], "steps": table.steps, "guidance": guidance, "seed": seed}
        settings |= {name: value for name, value in asked_of_guidance.items() if value}
        write_json(json, settings | {"precision": precision} | asdict(result))
        print(f"wrote {json}")
