"""Sampling: one function for every engine."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Callback
from ddpm.inference import kept_form, lock_of
from ddpm.noise import Noise
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import given, make_table
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory

SOLVER = "ddpm"


def chosen_table(
    schedule: NoiseSchedule, solver: str, steps: int | None, table: StepTable | None, options: Mapping[str, object]
) -> StepTable:
    """The table given, or the solver's. Raises ValueError for solver, steps or options beside a table."""
    if table is None:
        return make_table(schedule, solver, steps, **options)
    for name, value in given({"solver": None if solver == SOLVER else solver, "steps": steps, **options}).items():
        raise ValueError(f"{name}: got {value!r} beside a table, which has its own, needs one of the two")
    return table


def sample(
    model: nn.Module,
    schedule: NoiseSchedule,
    n: int,
    *,
    solver: str = SOLVER,
    steps: int | None = None,
    table: StepTable | None = None,
    context: Tensor | None = None,
    negative: Tensor | None = None,
    guidance: float | Sequence[float] | Tensor = 1.0,
    guidance_rescale: float = 0.0,
    seed: int = 0,
    first_sample: int = 0,
    engine: str = "auto",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    noise: Noise | None = None,
    x_T: Tensor | None = None,  # noqa: N803 (its name in the papers)
    callback: Callback | None = None,
    **table_options: object,
) -> Tensor:
    """Draw n samples: a `Trajectory` prepared and run once, always with the model's present weights.

    solver, steps, table_options: see `make_table`. table: a StepTable instead of them. engine, dtype: see `Trajectory`;
    the rest: see `Trajectory.__call__`. The model runs in eval mode, on its device. Threads that sample one model take
    turns; none may train it or change its weights meanwhile.

    Returns and raises as a `Trajectory` does.
    """
    table = chosen_table(schedule, solver, steps, table, table_options)
    with lock_of(model):
        trajectory = Trajectory(model, schedule, table, engine=engine, dtype=dtype, guided=True, form=kept_form)
        more = {"negative": negative, "guidance_rescale": guidance_rescale}
        return trajectory(n, context, guidance, seed, first_sample, batch_size, noise, x_T, callback, **more)
