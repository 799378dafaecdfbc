"""Editing: pictures that begin in the middle of a trajectory, or of which some pixels are known."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Callback
from ddpm.errors import check_integer, check_number
from ddpm.networks.inpaint import Inpaint, check_keep
from ddpm.networks.protocol import rows_of_condition, sample_shape
from ddpm.noise import Noise, PhiloxNoise
from ddpm.sampling import SOLVER, chosen_table, sample
from ddpm.schedule import NoiseSchedule
from ddpm.table import StepTable
from ddpm.trajectory import weights_of
from kernels import philox
from kernels.q_sample import pixels_to_unit


def rest_of(table: StepTable, schedule: NoiseSchedule, strength: float) -> StepTable:
    """The rows of a table from strength T on: all for 1. Raises ValueError."""
    strength = check_number("strength", strength, 0, 1, "0 < strength <= 1")
    # Divided, not multiplied: 57 / 100 is what 0.57 is.
    shares = [t / schedule.timesteps for t in table.timesteps.tolist()]
    starts = [i for i, share in enumerate(shares) if bool(table.begins[i]) and share <= strength]
    if strength == 0 or not starts:
        last = float(table.timesteps[-1]) / schedule.timesteps
        raise ValueError(f"strength: got {strength:g}, needs {last:g}..1 with this table")
    return table.from_row(starts[0]) if starts[0] else table


def edit(
    model: nn.Module,
    schedule: NoiseSchedule,
    images: Tensor,
    n: int | None = None,
    *,
    strength: float = 0.6,
    mask: Tensor | None = None,
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
    callback: Callback | None = None,
    **table_options: object,
) -> Tensor:
    """Pictures like others: noised to timestep strength T and sampled from there (SDEdit, Meng et al. 2022).

    Args:
        images: one [*sample_shape] for all n (default 1), or [n, *sample_shape]; float in [-1, 1], or uint8.
        strength: share of T that is sampled again, 0 < strength <= 1; at 1 little is left of the picture.
        mask: [H, W] or [1 or C, H, W], not zero where pixels are made anew; the others stay exactly as they are. For
            all images. With it strength 1 is usual, and solver ddpm with `resample` blends best.
        table: instead of solver, steps and table_options, see `make_table`; the rest is as in `sample`.

    Sample k starts from its initial noise of the noise contract. Returns float32 [n, *sample_shape]. Raises ValueError.
    """
    shape = sample_shape(model)
    table = chosen_table(schedule, solver, steps, table, table_options)
    images = pixels_to_unit(images).to(torch.float32)
    one = tuple(images.shape) == shape
    n = (1 if one else images.shape[0]) if n is None else n
    check_integer("n", n)
    if not one and tuple(images.shape) != (n, *shape):
        raise ValueError(f"images: got shape {list(images.shape)}, needs {list(shape)} or {[n, *shape]}")
    if not bool(images.isfinite().all()):
        raise ValueError("images: got NaN or infinite values, needs finite ones")
    device = next(model.parameters(), images).device
    images = images.to(device)
    part = rest_of(table, schedule, strength)
    draw = PhiloxNoise(seed) if noise is None else noise
    samples = torch.arange(first_sample, first_sample + n, device=device)
    alpha_bar = schedule.alpha_bar(float(part.timesteps[0]))
    z = draw(samples, 0, philox.Stream.INITIAL, shape)
    begin = (math.sqrt(alpha_bar) * images + math.sqrt(1 - alpha_bar) * z).expand(n, *shape)
    each = {"x_T": begin, "guidance": weights_of(guidance, n)}
    for name, condition in (("context", context), ("negative", negative)):
        each[name] = rows_of_condition(model, condition, n, device, name)
    more = {"guidance_rescale": guidance_rescale, "seed": seed, "batch_size": batch_size}
    more |= {"noise": noise, "callback": callback, "engine": engine, "dtype": dtype}

    def run(network: nn.Module, first: int, count: int) -> Tensor:
        part_of = slice(first, first + count)
        own = {name: value[part_of] if isinstance(value, Tensor) else value for name, value in each.items()}
        return sample(network, schedule, count, table=part, first_sample=first_sample + first, **own, **more)

    if mask is None:
        return run(model, 0, n)
    keep = torch.as_tensor(mask, device=device) == 0
    check_keep("mask", keep, shape)

    def filled(image: Tensor, first: int, count: int) -> Tensor:
        network = Inpaint(model, schedule, image, keep, part.prediction)
        return torch.where(keep, image, run(network, first, count))

    if one:
        return filled(images, 0, n)
    return torch.cat([filled(image, k, 1) for k, image in enumerate(images)])
