"""Suite `ladder`: an ablation of the guided step. Each candidate has what the one before has and one thing more.

So the difference of two is what that thing brings; the first has it beyond eager. A call is five rows of the ddpm
table, as many as engines draw noise for at once at batch 32, see `ddpm.noise.NOISE_BATCH_ELEMENTS`.
"""

from functools import cache, partial
from typing import Any

import torch

from bench.registry import Bench, Workload
from bench.suites.networks import SCHEDULE, judged, network, sampling_call, sampling_cost
from bench.suites.networks import SEED as SEED  # noted beside the records
from ddpm import make_table
from ddpm.engines import unavailable_reason
from ddpm.inference import Layout, make_form
from ddpm.inference.context_unet import fold_batch_norm
from ddpm.precision import computed_in
from kernels.winograd import missing

STEPS, GUIDANCE = 5, 2.0
BATCH, QUICK_BATCH = 32, 8
FOLDED, WINOGRAD = "folded", "winograd"


def _fused(**layout: bool) -> dict[str, Any]:
    return {"engine": "fused", "form": partial(make_form, layout=Layout(**layout))}


# Name -> how `Trajectory` runs it. The network of FOLDED is folded before.
RUNGS: dict[str, dict[str, Any]] = {
    FOLDED: {"engine": "eager"},
    "tables": _fused(channels_last=False, shared=False),  # winograd is for channels_last alone
    "shared": _fused(channels_last=False),
    "channels_last": _fused(winograd=False),
    WINOGRAD: {"engine": "fused"},
    "compile": {"engine": "compile"},
    "bf16": {"engine": "compile", "dtype": torch.bfloat16},
    "graph": {"engine": "graph", "dtype": torch.bfloat16},
}


def _lack(name: str, device: torch.device) -> str | None:
    """What is missing for it to run, and to be what it is called; or None."""
    dtype = RUNGS[name].get("dtype", torch.float32)
    lack = unavailable_reason(RUNGS[name]["engine"], device, dtype)
    if lack is None and name == WINOGRAD:
        lack = missing() if device.type == "cpu" else "a CPU"
    if lack is None and computed_in(dtype, device) != dtype:  # engines take float32 in its place
        lack = "a CPU with AVX512-BF16 or AMX"
    return lack


def unavailable() -> dict[str, str]:
    """What is left out on this machine, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lacks = {name: _lack(name, device) for name in RUNGS}
    return {name: f"suite ladder: {name} needs {lack}" for name, lack in lacks.items() if lack is not None}


def _build(batch: int, device: torch.device) -> Bench:
    model, table = network(device), make_table(SCHEDULE, "ddpm", STEPS)
    eager = sampling_call(model, table, batch, GUIDANCE)
    expected, candidates = cache(eager), {}
    for name, how in RUNGS.items():
        if _lack(name, device) is None:
            own = fold_batch_norm(model) if name == FOLDED else model
            make = partial(sampling_call, own, table, batch, GUIDANCE, **how)
            candidates |= judged(expected, {name: make}, how.get("dtype", torch.float32))
    return Bench([()], eager, candidates, sampling_cost(model, batch, STEPS, GUIDANCE), calls=STEPS)


def workloads(quick: bool) -> list[Workload]:
    """One."""
    batch = QUICK_BATCH if quick else BATCH
    return [Workload(f"ladder/batch{batch}", "ladder", partial(_build, batch))]
