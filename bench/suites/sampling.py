"""Suite `sampling`: whole runs of `ddpm.sample`, network, table and noise included, through every engine.

`short` is one image in four steps, where what a call prepares weighs most.
"""

from functools import partial

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, SEED, contexts, judged, network, sampling_cost
from ddpm import sample
from ddpm.engines import competitors

SIZES = ((20, 64),)  # ddim steps, images
QUICK_SIZES = ((5, 8),)
SHORT = (4, 1)


def _build(steps: int, n: int, device: torch.device) -> Bench:
    model, context = network(device), contexts(n, device)

    def draw(engine: str) -> torch.Tensor:
        return sample(model, SCHEDULE, n, solver="ddim", steps=steps, context=context, seed=SEED, engine=engine)

    makes = {name: lambda name=name: partial(draw, name) for name in competitors(device)}
    eager = partial(draw, "eager")
    return Bench([()], eager, judged(eager, makes), sampling_cost(model, n, steps), images=n)


def workloads(quick: bool) -> list[Workload]:
    """By steps and images."""
    sizes = {"sampling": QUICK_SIZES if quick else SIZES, "sampling/short": (SHORT,)}
    return [
        Workload(f"{head}/ddim{steps}/n{n}", "sampling", partial(_build, steps, n))
        for head, some in sizes.items()
        for steps, n in some
    ]
