"""Suite `step`: one solver step with its network, through every engine of `ddpm.engines`.

A call is a trajectory of ten rows of the ddpm table, so times are per step. The reference, also of candidates in
bfloat16, is the eager engine in float32.
"""

from functools import partial

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, judged, network, sampling_call, sampling_cost
from bench.suites.networks import SEED as SEED  # noted beside the records
from ddpm import make_table
from ddpm.engines import competitors
from ddpm.precision import computed_in

STEPS = 10
GUIDANCE = {"plain": 1.0, "guided": 2.0}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 8, 32)
QUICK_BATCHES = (1, 32)


def _build(batch: int, dtype: torch.dtype, guidance: float, device: torch.device) -> Bench:
    table = make_table(SCHEDULE, "ddpm", STEPS)
    eager = sampling_call(network(device), table, batch, guidance)
    kind = computed_in(dtype, device)
    makes = {
        name: partial(sampling_call, network(device), table, batch, guidance, name, dtype)
        for name in competitors(device)
    }
    cost = sampling_cost(network(device), batch, STEPS, guidance, kind)
    return Bench([()], eager, judged(eager, makes, kind), cost, calls=STEPS)


def workloads(quick: bool) -> list[Workload]:
    """Batch x type x guidance."""
    types = {"fp32": torch.float32} if quick else TYPES
    return [
        Workload(f"step/{label}/batch{batch}/{kind}", "step", partial(_build, batch, dtype, guidance))
        for label, dtype in types.items()
        for batch in (QUICK_BATCHES if quick else BATCHES)
        for kind, guidance in GUIDANCE.items()
    ]
