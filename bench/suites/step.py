"""Suite `step`: one solver step with its network, through every engine of `ddpm.engines`.

A call is a trajectory of ten rows of the ddpm table, so times are per step. The reference, also of candidates in
bfloat16, is the eager engine in float32.
"""

from functools import partial

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, TYPES, judged, network, sampling_call, sampling_cost
from bench.suites.networks import SEED as SEED  # noted beside the records
from ddpm import make_table
from ddpm.engines import competitors
from ddpm.precision import computed_in

STEPS = 10
GUIDANCE = {"plain": 1.0, "guided": 2.0}


def _build(batch: int, dtype: torch.dtype, guidance: float, device: torch.device) -> Bench:
    model, kind = network(device), computed_in(dtype, device)
    call = partial(sampling_call, model, make_table(SCHEDULE, "ddpm", STEPS), batch, guidance)
    eager, makes = call(), {name: partial(call, name, dtype=dtype) for name in competitors(device, dtype)}
    cost = sampling_cost(model, batch, STEPS, guidance, kind)
    return Bench([()], eager, judged(eager, makes, kind), cost, calls=STEPS)


def workloads(quick: bool) -> list[Workload]:
    """Type x batch x guidance."""
    return [
        Workload(f"step/{label}/batch{batch}/{kind}", "step", partial(_build, batch, TYPES[label], guidance))
        for label in (("fp32",) if quick else TYPES)
        for batch in ((1, 32) if quick else (1, 8, 32))
        for kind, guidance in GUIDANCE.items()
    ]
