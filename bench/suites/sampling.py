"""Suite `sampling`: whole runs of `ddpm.sample`, network, table and noise included, through every engine.

`short` is one image in four steps, where what a call prepares weighs most.
"""

from functools import cache, partial

import torch

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import (
    PARITY,
    SEED,
    TIMESTEPS,
    contexts,
    forward_flops,
    network,
    step_bytes,
)
from ddpm import NoiseSchedule, sample
from ddpm.engines import competitors
from ddpm.metrics import engine_error
from kernels.backend import Cost

SIZES = ((20, 64),)  # ddim steps, images
QUICK_SIZES = ((5, 8),)
SHORT = (4, 1)


def _build(steps: int, n: int, device: torch.device) -> Bench:
    model, schedule = network(device), NoiseSchedule.make("linear", TIMESTEPS)
    context = contexts(n, device)

    def draw(engine: str) -> torch.Tensor:
        return sample(model, schedule, n, solver="ddim", steps=steps, context=context, seed=SEED, engine=engine)

    expected = cache(lambda: draw("eager"))
    candidates = {
        name: Candidate(
            lambda name=name: partial(draw, name),
            lambda call: engine_error(call(), expected(), torch.float32),
            PARITY[torch.float32],
        )
        for name in competitors(device)
    }
    cost = Cost(steps * step_bytes(model, n, torch.float32), steps * n * forward_flops())
    return Bench([()], partial(draw, "eager"), candidates, cost, images=n)


def workloads(quick: bool) -> list[Workload]:
    """By steps and images."""
    sizes = {"sampling": QUICK_SIZES if quick else SIZES, "sampling/short": (SHORT,)}
    return [
        Workload(f"{head}/ddim{steps}/n{n}", "sampling", partial(_build, steps, n))
        for head, some in sizes.items()
        for steps, n in some
    ]
