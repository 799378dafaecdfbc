"""What a rung does to the pictures: the whole trajectory beside eager's and beside a float64 run."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.ladder.rungs import EAGER, RUNGS, Job
from bench.suites.networks import PARITY
from ddpm import evaluation
from ddpm.commands.drawing import class_count, cycled_classes
from ddpm.data import Dataset
from ddpm.metrics import distance, psnr
from ddpm.progress import Bar

# Of the fp32 rungs on trained weights: DESIGN's bound beside eager's own distance from a float64 run.
TIMES_EAGER, SLACK = 4.0, 1e-6
# The two types are judged by the same engine; another seed shows what is noise.
JUDGED = {"fp32": ("compile", 0), "fp32, another seed": ("compile", 1), "bf16": ("bf16", 0)}


def _finite(value: float) -> float | None:
    """For a record: JSON has no infinity."""
    return value if math.isfinite(value) else None


def judge(names: list[str], job: Job, quiet: bool = False) -> dict[str, dict[str, Any]]:
    """rung -> {"to_eager", "to_float64", "psnr_db", "tolerance", "parity"} after the whole trajectory.

    Distances of pictures that are not finite are None. psnr_db is None where pictures are equal.
    fp32 rungs must stay within the smaller of 1e-4 and four times eager's own distance from float64 plus 1e-6. For
    lower types there is no such bound (tolerance None): their timed steps have one, their pictures `evaluated`.
    """
    steps, found = len(job.table), {}
    with Bar("quality", steps * (len(names) + 1), "steps/s", quiet=quiet) as bar:

        def whole(name: str, position: int, exact: bool = False) -> Tensor:
            def callback(step: int, _: Tensor) -> None:
                bar.update(position * steps + step + 1, f"{name} in float64" if exact else name)

            return job.call(RUNGS[name], job.table, exact=exact, callback=callback)()

        exact = whole(EAGER, 0, exact=True)
        eager = whole(EAGER, 1)
        own = distance(eager, exact)
        for position, name in enumerate(names, start=1):
            images = eager if name == EAGER else whole(name, position)
            fp32 = RUNGS[name].dtype == torch.float32
            tolerance = min(PARITY[torch.float32], TIMES_EAGER * own + SLACK) if fp32 else None
            to_eager = distance(images, eager)
            found[name] = {
                "to_eager": _finite(to_eager),
                "to_float64": _finite(distance(images, exact)),
                "psnr_db": _finite(psnr(images, eager)),
                "tolerance": tolerance,
                "parity": math.isfinite(to_eager) and (tolerance is None or to_eager <= tolerance),
            }
    return found


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
        classes = cycled_classes(job.run, 0, n) if class_count(job.run) else None
        found[label] = evaluation.evaluate(torch.cat(drawn)[:n].cpu(), dataset, classes).asdict()
    return found
