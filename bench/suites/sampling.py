"""Suite `sampling`: whole runs of `ddpm.sample`, network, table and noise included, through every engine."""

from functools import cache, partial

import torch

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import (
    PARITY,
    SEED,
    TIMESTEPS,
    competitors,
    contexts,
    engine_error,
    forward_flops,
    network,
    step_bytes,
)
from ddpm import NoiseSchedule, sample
from kernels.backend import Cost

SIZES = ((20, 64),)  # ddim steps, images
QUICK_SIZES = ((5, 8),)


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
    return [
        Workload(f"sampling/ddim{steps}/n{n}", "sampling", partial(_build, steps, n))
        for steps, n in (QUICK_SIZES if quick else SIZES)
    ]
