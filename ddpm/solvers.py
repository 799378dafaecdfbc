"""Solvers are tables: every sampler is one row of seven numbers per step, and one kernel runs any of them.

    x0    = c0 x + c1 m ;  clamp to [-clip, clip] if clip is set         m = network output
    x_new = c2 x + c3 x0 + c4 m + c5 x0_previous + c6 z                  x0_previous <- x0

Below, a = alpha_bars[t], s = alpha_bars of the next (smaller) timestep, sigma^2 = 1 - a. Everything is float64.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ddpm.schedule import NoiseSchedule
from kernels.philox import is_integer

# Keeps divisions finite where alpha_bar underflows; such tables are refused by the range of float32.
ALPHA_BAR_MIN = 1e-300
PREDICTIONS = ("eps", "v", "x0")
VARIANCES = ("posterior", "beta")
SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: row i goes from timesteps[i] to timesteps[i + 1], the last one to 0.

    timesteps: int64 [S], descending, within 1..T. coefficients: float64 [S, 7], see the module docstring.
    clip: bound of x0, or None. Both tensors live on the CPU.
    """

    timesteps: Tensor
    coefficients: Tensor
    clip: float | None = None

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    def rows(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """What `kernels.solver_step` reads: [S, 8], the seven coefficients and t, cast once."""
        table = torch.cat([self.coefficients, self.timesteps[:, None].to(torch.float64)], dim=1)
        return table.to(device=device, dtype=dtype)


def timestep_grid(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """The timesteps visited, int64 [S], descending: S = 1 always starts at T.

    trailing: round(T - k T/S); leading: (T//S) k + 1, S must divide T; linspace: round(linspace(0, T-1, S)) + 1
    (Lin et al. 2024, table 2, shifted to 1..T). Raises ValueError for S outside 1..T or an unknown spacing.
    """
    if not is_integer(steps) or not 1 <= steps <= timesteps:
        raise ValueError(f"steps: got {steps!r}, needs an integer in 1..{timesteps} (the schedule's timesteps)")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: got {spacing!r}, needs one of {', '.join(SPACINGS)}")
    k = np.arange(steps)
    if steps == 1:
        grid = np.array([timesteps])
    elif spacing == "trailing":
        grid = np.round(timesteps - k * timesteps / steps)
    elif spacing == "leading":
        if timesteps % steps:
            raise ValueError(f"steps: got {steps}, needs a divisor of {timesteps} with spacing 'leading'")
        grid = ((timesteps // steps) * k + 1)[::-1]
    else:
        grid = (np.round(np.linspace(0, timesteps - 1, steps)) + 1)[::-1]
    return grid.astype(np.int64)


def _to_x0(prediction: str, a: float) -> tuple[float, float]:
    """(c0, c1) of x0 = c0 x + c1 m."""
    if prediction == "eps":
        return 1 / math.sqrt(a), -math.sqrt(1 - a) / math.sqrt(a)
    if prediction == "v":
        return math.sqrt(a), -math.sqrt(1 - a)
    return 0.0, 1.0


def _to_eps(prediction: str, a: float) -> tuple[float, float]:
    """(p, q) of eps = p x + q m: the network's own noise, whatever becomes of x0."""
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "v":
        return math.sqrt(1 - a), math.sqrt(a)
    return 1 / math.sqrt(1 - a), -math.sqrt(a) / math.sqrt(1 - a)


def ddpm_rows(alpha_bars: list[float], prediction: str, variance: str) -> list[list[float]]:
    """The posterior q(x_s | x_t, x0), Ho et al. 2020, equations 6 and 7, between any two timesteps."""
    rows = []
    for a, s in pairwise(alpha_bars):
        alpha, beta = a / s, 1 - a / s
        noise = beta if variance == "beta" else beta * (1 - s) / (1 - a)
        c2, c3 = math.sqrt(alpha) * (1 - s) / (1 - a), math.sqrt(s) * beta / (1 - a)
        rows.append([*_to_x0(prediction, a), c2, c3, 0.0, 0.0, math.sqrt(noise)])
    return rows


def ddim_rows(alpha_bars: list[float], prediction: str, eta: float) -> list[list[float]]:
    """Song, Meng, Ermon 2021, equations 12 and 16; the direction keeps the network's own eps."""
    rows = []
    for a, s in pairwise(alpha_bars):
        noise = eta * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
        direction = math.sqrt(max(1 - s - noise**2, 0.0))
        p, q = _to_eps(prediction, a)
        rows.append([*_to_x0(prediction, a), direction * p, math.sqrt(s), direction * q, 0.0, noise])
    return rows


def _dpmpp_2m_rows(alpha_bars: list[float], prediction: str) -> list[list[float]]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, in data prediction; first order at both ends.

    With lambda = ln(sqrt(a) / sqrt(1 - a)), h its increase and r = h_previous / h:
    x_new = sigma_s / sigma_t x - sqrt(s) expm1(-h) ((1 + 1/2r) x0 - 1/2r x0_previous). The step to 0 lands on x0.
    """
    rows, h_previous = [], None
    *inner, last = pairwise(alpha_bars)
    for a, s in inner:
        h = 0.5 * (math.log(s / (1 - s)) - math.log(a / (1 - a)))
        weight = -math.sqrt(s) * math.expm1(-h)
        memory = 0.0 if h_previous is None else h / (2 * h_previous)
        c2 = math.sqrt((1 - s) / (1 - a))
        rows.append([*_to_x0(prediction, a), c2, weight * (1 + memory), 0.0, -weight * memory, 0.0])
        h_previous = h
    return [*rows, [*_to_x0(prediction, last[0]), 0.0, 1.0, 0.0, 0.0, 0.0]]


SOLVERS = ("ddpm", "ddim", "dpmpp_2m")


def make_table(
    schedule: NoiseSchedule,
    solver: str,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    variance: str = "posterior",
    prediction: str = "eps",
    clip: float | None = None,
    spacing: str = "trailing",
) -> StepTable:
    """The table of a sampler on a schedule.

    Args:
        schedule: only its alpha_bars are used.
        solver: `ddpm` (ancestral sampling), `ddim` (eta of its noise, 0 = deterministic) or `dpmpp_2m`.
        steps: S in 1..T, default T.
        eta: 0..1, ddim only. variance: `posterior` or `beta` (the larger one), ddpm only.
        prediction: what the network was trained to output: `eps`, `v` (Salimans & Ho 2022) or `x0`.
        clip: bound of x0, or None.
        spacing: of the timesteps, see `timestep_grid`.

    Raises: ValueError naming the argument, what it was and what it must be.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, needs one of {', '.join(SOLVERS)}")
    if variance not in VARIANCES:
        raise ValueError(f"variance: got {variance!r}, needs one of {', '.join(VARIANCES)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: got {prediction!r}, needs one of {', '.join(PREDICTIONS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, needs 0 <= eta <= 1")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}, needs a bound > 0 or None")
    timesteps = timestep_grid(schedule.timesteps, schedule.timesteps if steps is None else steps, spacing)
    alpha_bars = schedule.alpha_bars[np.append(timesteps, 0)].clamp(min=ALPHA_BAR_MIN).tolist()
    if solver == "ddpm":
        rows = ddpm_rows(alpha_bars, prediction, variance)
    elif solver == "ddim":
        rows = ddim_rows(alpha_bars, prediction, eta)
    else:
        rows = _dpmpp_2m_rows(alpha_bars, prediction)
    coefficients = torch.tensor(rows, dtype=torch.float64)
    coefficients[-1, 6] = 0.0
    if not coefficients.to(torch.float32).isfinite().all():
        raise ValueError(
            f"schedule: alpha_bars[{timesteps[0]}] = {alpha_bars[0]:.2g} needs coefficients beyond float32; "
            "use fewer timesteps, smaller betas, or start later"
        )
    return StepTable(torch.from_numpy(timesteps), coefficients, None if clip is None else float(clip))
