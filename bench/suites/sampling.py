"""Suite `sampling`: whole runs of `ddpm.sample`, network, table and noise included, through every engine.

`short` is one image in four steps, where what a call prepares weighs most.
"""

from functools import partial

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, SEED, contexts, judged, network, sampling_cost
from ddpm import sample
from ddpm.engines import competitors


def _build(steps: int, n: int, device: torch.device) -> Bench:
    model = network(device)
    options = {"solver": "ddim", "steps": steps, "context": contexts(n, device), "seed": SEED}

    def draw(engine: str) -> torch.Tensor:
        return sample(model, SCHEDULE, n, engine=engine, **options)

    eager, makes = partial(draw, "eager"), {name: partial(partial, draw, name) for name in competitors(device)}
    return Bench([()], eager, judged(eager, makes), sampling_cost(model, n, steps), images=n)


def workloads(quick: bool) -> list[Workload]:
    """By steps and images."""
    return [
        Workload(f"{head}/ddim{steps}/n{n}", "sampling", partial(_build, steps, n))
        for head, steps, n in (("sampling", *((5, 8) if quick else (20, 64))), ("sampling/short", 4, 1))
    ]
