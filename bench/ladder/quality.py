"""What a rung does to the pictures: the whole trajectory beside eager's and beside a float64 run."""

from collections.abc import Callable
from dataclasses import replace
from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ladder.rungs import EAGER, RUNGS, Job
from bench.suites.networks import PARITY, distance
from ddpm import evaluation, fitting
from ddpm.data import Dataset
from ddpm.errors import BadInput
from ddpm.progress import Bar

# Of the fp32 rungs on trained weights: DESIGN's bound beside eager's own distance from a float64 run.
TIMES_EAGER, SLACK = 4.0, 1e-6
# The two types are judged by the same engine; another seed shows what is noise.
JUDGED = {"fp32": ("compile", 0), "fp32, another seed": ("compile", 1), "bf16": ("bf16", 0)}


def psnr(actual: Tensor, expected: Tensor) -> float | None:
    """Peak signal to noise in dB of pictures in [-1, 1], clamped; None where they are equal."""
    error = float((actual.clamp(-1, 1).double() - expected.clamp(-1, 1).double()).square().mean())
    return 10 * log10(4 / error) if error > 0 else None


def judge(names: list[str], job: Job, quiet: bool = False) -> dict[str, dict[str, Any]]:
    """rung -> {"to_eager", "to_float64", "psnr_db", "tolerance", "parity"} after the whole trajectory.

    fp32 rungs must stay within the smaller of 1e-4 and four times eager's own distance from float64 plus 1e-6. For
    lower types there is no such bound (tolerance None): their timed steps have one, their pictures `evaluated`.
    """
    steps, found = len(job.table), {}
    with Bar("quality", steps * (len(names) + 1), "steps/s", quiet=quiet) as bar:

        def whole(name: str, position: int, state: torch.dtype = torch.float32) -> Tensor:
            def callback(step: int, _: Tensor) -> None:
                label = name if state == torch.float32 else f"{name} in float64"
                bar.update(position * steps + step + 1, label)

            return job.call(RUNGS[name], job.table, state=state, callback=callback)()

        exact = whole(EAGER, 0, torch.float64)
        eager = whole(EAGER, 1)
        own = distance(eager, exact)
        for position, name in enumerate(names, start=1):
            images = eager if name == EAGER else whole(name, position)
            fp32 = RUNGS[name].dtype == torch.float32
            tolerance = min(PARITY[torch.float32], TIMES_EAGER * own + SLACK) if fp32 else None
            to_eager = distance(images, eager)
            found[name] = {
                "to_eager": to_eager,
                "to_float64": distance(images, exact),
                "psnr_db": psnr(images, eager),
                "tolerance": tolerance,
                "parity": bool(images.isfinite().all()) and (tolerance is None or to_eager <= tolerance),
            }
    return found


def training_data(job: Job, data: Path, labels: Path | None) -> Dataset:
    """The data of a run. Raises BadInput if it is other data."""
    run = job.run
    if not isinstance(run.config.get("training"), dict):
        raise BadInput(f"{run.folder}: an imported run knows no training data to compare with, needs no --data")
    moved = {"data": str(data), "labels": None if labels is None else str(labels)}
    dataset = replace(fitting.resumed_options(run.folder, {}), **moved).load_data()
    if dataset.digest() != run.config["data"]["digest"]:
        raise BadInput(f"{run.folder}: was trained on other data than {data}, needs the same (--data, --labels)")
    return dataset


def evaluated(
    names: list[str], job: Job, dataset: Dataset, n: int, update: Callable[[int, str], None]
) -> dict[str, dict[str, Any]]:
    """Frechet distance and class accuracy, as `ddpm evaluate` has them, of n samples in fp32 and in bf16.

    update(done, label) is told the steps done. A type whose rung is not in `names` is left out.
    """
    found, done = {}, 0
    chunks = -(-n // job.batch)
    for label, (name, seed) in JUDGED.items():
        if name not in names:
            continue

        def callback(step: int, _: Tensor, label: str = label) -> None:
            nonlocal done
            done += 1
            update(done, label)

        seeded = replace(job, seed=seed)
        drawn = [
            seeded.call(RUNGS[name], job.table, first_sample=chunk * job.batch, callback=callback)()
            for chunk in range(chunks)
        ]
        classes = torch.arange(n) % job.run.model.n_cfeat if job.run.model.n_cfeat else None
        found[label] = evaluation.evaluate(torch.cat(drawn)[:n].cpu(), dataset, classes).asdict()
    return found
