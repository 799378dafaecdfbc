"""The noise schedules of denoising_diffusion_pytorch: betas of t = 1..T, float64 [T], to the last bit of float32."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import check_choice, check_integer
from ddpm.schedule import NoiseSchedule

BETA_MAX = 0.999


def _linear(timesteps: int) -> np.ndarray:
    """Ho et al. 2020, scaled so that any T ends alike."""
    return np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)


def _from_signal(signal: np.ndarray) -> np.ndarray:
    return np.clip(1 - signal[1:] / signal[:-1], 0, BETA_MAX)


def _cosine(timesteps: int, s: float = 0.008) -> np.ndarray:
    """Nichol & Dhariwal 2021."""
    t = np.linspace(0, 1, timesteps + 1)
    return _from_signal(np.cos((t + s) / (1 + s) * math.pi / 2) ** 2)


def _sigmoid(timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5) -> np.ndarray:
    """Jabri, Fleet, Chen 2022, figure 8. clamp_min has no effect there either."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    # Its end in float32, as weights were trained: near T, where alpha_bar is 3e-4, that is 1e-4 of it.
    last = torch.tensor(end / tau, dtype=torch.float32).sigmoid().double()
    return _from_signal((last - torch.sigmoid((start + t * (end - start)) / tau)).numpy())


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}


def schedule_of(kind: str, timesteps: int, options: Mapping[str, float]) -> NoiseSchedule:
    """The schedule of `beta_schedule`, timesteps and schedule_fn_kwargs. Raises ValueError naming the argument."""
    check_choice("beta_schedule", kind, SCHEDULES)
    check_integer("timesteps", timesteps)
    try:
        betas = SCHEDULES[kind](int(timesteps), **options)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"schedule_fn_kwargs: got {options!r}, which {kind} does not take: {error}") from error
    if not ((betas > 0) & (betas < 1)).all():
        held = f"{kind!r} of {timesteps} timesteps and {dict(options)} has betas {betas.min():.3g}..{betas.max():.3g}"
        raise ValueError(f"beta_schedule: {held}, needs 0 < beta < 1: more timesteps, or other options")
    return NoiseSchedule.from_alpha_bars(np.cumprod(1 - betas))


def buffers_of(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """What a state dict there holds of a schedule, by name: float64 [T], of t = 1..T."""
    betas, before, signal = schedule.betas[1:], schedule.alpha_bars[:-1], schedule.alpha_bars[1:]
    noise = 1 - signal
    variance = betas * (1 - before) / noise
    return {
        "betas": betas,
        "alphas_cumprod": signal,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": signal.sqrt(),
        "sqrt_one_minus_alphas_cumprod": noise.sqrt(),
        "log_one_minus_alphas_cumprod": noise.log(),
        "sqrt_recip_alphas_cumprod": (1 / signal).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / signal - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / noise,
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / noise,
    }
