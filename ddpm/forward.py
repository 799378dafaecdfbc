"""The forward process: data becoming noise, step by step and at once.

    q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, 1 - alpha_t)        alpha_t = alpha_bars[t] / alpha_bars[t - 1]
    q(x_t | x_0)     = N(sqrt(alpha_bars[t]) x_0, 1 - alpha_bars[t])

(Ho et al. 2020, equations 2 and 4). Both are one distribution; training uses the second, `kernels.q_sample`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.errors import check_integer
from ddpm.noise import Noise, PhiloxNoise
from ddpm.schedule import NoiseSchedule
from kernels import philox, q_sample
from kernels.q_sample import pixels_to_unit


def chain(
    x0: Tensor, schedule: NoiseSchedule, times: Sequence[int], seed: int = 0, noise: Noise | None = None
) -> list[Tensor]:
    """x at these times, from one Markov chain of single steps: float32 [n, ...] each.

    x0: data [n, ...], float, or uint8 as images are. times: in 0..T, ascending. noise: instead of Philox's stream 1,
    of which step t draws its own. Raises ValueError.
    """
    _check_times(schedule, times)
    x, samples = pixels_to_unit(x0).to(torch.float32), torch.arange(len(x0), device=x0.device)
    draw = PhiloxNoise(seed) if noise is None else noise
    alphas = (schedule.alpha_bars[1:] / schedule.alpha_bars[:-1]).tolist()
    states = {0: x}
    for t, alpha in enumerate(alphas[: max(times, default=0)], start=1):
        z = draw(samples, t, philox.Stream.SAMPLING, tuple(x.shape[1:]))
        x = alpha**0.5 * x + (1 - alpha) ** 0.5 * z
        if t in times:
            states[t] = x
    return [states[t] for t in times]


def closed_form(x0: Tensor, schedule: NoiseSchedule, times: Sequence[int], seed: int = 0) -> list[Tensor]:
    """x at these times, each at once from x0 by `q_sample`, with one noise for all: float32 [n, ...] each."""
    _check_times(schedule, times)
    alpha_bars = schedule.alpha_bars.to(x0.device, torch.float32)
    samples = torch.arange(len(x0), device=x0.device)

    def at(t: int) -> Tensor:
        return q_sample(x0, torch.full_like(samples, t), alpha_bars, seed, samples)[0]

    return [at(t) if t else pixels_to_unit(x0).to(torch.float32) for t in times]


def _check_times(schedule: NoiseSchedule, times: Sequence[int]) -> None:
    for before, t in zip((0, *times), times, strict=False):
        check_integer("times", t, before, schedule.timesteps)
