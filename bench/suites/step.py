"""Suite `step`: one solver step with its network, through every engine of `ddpm.engines`.

A call is a trajectory of ten rows of the ddpm table, so times are per step. The reference, also of candidates in
bfloat16, is the eager engine in float32.
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
from bench.timing import Call
from ddpm import NoiseSchedule, Trajectory, make_table
from ddpm.engines import competitors
from ddpm.metrics import engine_error
from ddpm.networks import sample_shape
from ddpm.noise import PhiloxNoise
from ddpm.precision import computed_in
from kernels import philox
from kernels.backend import Cost

STEPS = 10
GUIDANCE = {"plain": 1.0, "guided": 2.0}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 8, 32)
QUICK_BATCHES = (1, 32)


def _build(batch: int, dtype: torch.dtype, guidance: float, device: torch.device) -> Bench:
    model = network(device)
    schedule = NoiseSchedule.make("linear", TIMESTEPS)
    table, context = make_table(schedule, "ddpm", STEPS), contexts(batch, device)
    samples = torch.arange(batch, device=device)
    x = PhiloxNoise(SEED)(samples, 0, philox.Stream.INITIAL, sample_shape(model))

    def make(engine: str, kind: torch.dtype) -> Call:
        """Prepared here; a call runs the rows."""
        run = Trajectory(network(device), schedule, table, engine=engine, dtype=kind, guided=guidance != 1.0)
        return partial(run, batch, context, guidance, SEED, batch_size=batch, x_T=x)

    expected = cache(lambda: make("eager", torch.float32)())
    kind = computed_in(dtype, device)
    candidates = {
        name: Candidate(partial(make, name, dtype), lambda call: engine_error(call(), expected(), kind), PARITY[kind])
        for name in competitors(device)
    }
    calls = 1 if guidance == 1.0 else 2
    cost = Cost(STEPS * step_bytes(model, batch, kind), STEPS * calls * batch * forward_flops())
    return Bench([()], make("eager", torch.float32), candidates, cost, calls=STEPS)


def workloads(quick: bool) -> list[Workload]:
    """Batch x type x guidance."""
    types = {"fp32": torch.float32} if quick else TYPES
    return [
        Workload(f"step/{label}/batch{batch}/{kind}", "step", partial(_build, batch, dtype, guidance))
        for label, dtype in types.items()
        for batch in (QUICK_BATCHES if quick else BATCHES)
        for kind, guidance in GUIDANCE.items()
    ]
