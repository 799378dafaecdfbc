"""Noise schedules: alpha_bars, how much of the data is left at t = 1..T; at index 0, clean data, it is 1."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import check_choice, check_integer

GIVEN = "given"
KINDS = ("linear", "quad", "sigmoid", "constant", "cosine", "context_unet")
COSINE_OFFSET = 0.008
COSINE_BETA_MAX = 0.999
TIMESTEPS_MAX = 1_000_000  # what export/run.py reads; a longer table is a damaged file's
# Above this much signal left at t = T the network never sees what sampling starts from (Lin et al. 2024).
SIGNAL_LEFT_MAX = 0.05


def _beta_grid(kind: str, timesteps: int, start: float, end: float) -> np.ndarray:
    """betas of t = 1..T, float64 [T]."""
    if kind == "quad":
        return np.linspace(math.sqrt(start), math.sqrt(end), timesteps) ** 2
    if kind == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))
    if kind == "cosine":
        t = np.arange(timesteps + 1) / timesteps
        signal = np.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], COSINE_BETA_MAX)
    return np.linspace(start, end, timesteps)


def _warn_of_signal(kind: str, timesteps: int, left: float) -> None:
    if left > SIGNAL_LEFT_MAX:
        left_over = f"schedule {kind!r} with T = {timesteps} leaves alpha_bars[T] = {left:.2g} > {SIGNAL_LEFT_MAX}"
        unseen = "sampling starts from a distribution that training never saw"
        warnings.warn(f"{left_over}: {unseen}; use more timesteps, a larger beta_end, or cosine", stacklevel=3)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """betas, alphas, alpha_bars of t = 0..T: float64 [T+1] on the CPU. Build one with `make` or `from_alpha_bars`."""

    kind: str
    timesteps: int
    beta_start: float | None
    beta_end: float | None
    betas: Tensor
    alphas: Tensor
    alpha_bars: Tensor

    @classmethod
    def make(
        cls,
        kind: str,
        timesteps: int,
        beta_start: float | None = None,
        beta_end: float | None = None,
        alpha_bars: Sequence[float] | None = None,
    ) -> "NoiseSchedule":
        """The schedule of this name. Raises ValueError for what does not fit. Warns if alpha_bars[T] > 0.05.

        Kinds: `linear` (Ho et al. 2020), `quad` (linear in sqrt(beta)), `sigmoid` (logistic over -6..6),
        `constant` (every beta is beta_end or beta_start, of which one is given; default 0.035),
        `cosine` (Nichol & Dhariwal 2021, s = 0.008, beta <= 0.999; takes no betas), and `context_unet`,
        the T+1-point linear grid whose alpha_bars include b_0, as published weights of that network were trained with.
        beta_start and beta_end default to 1e-4 and 0.02. Kind `given` is what `from_alpha_bars` makes of alpha_bars.
        """
        if alpha_bars is not None:
            last = len(alpha_bars) - 1
            if kind != GIVEN:
                raise ValueError(f"alpha_bars: got them for schedule {kind!r}, needs kind {GIVEN!r}")
            if beta_start is not None or beta_end is not None or timesteps != last:
                raise ValueError(f"schedule: a given one has no betas and T = {last}, got T = {timesteps}")
            return cls.from_alpha_bars(alpha_bars)
        check_choice("schedule", kind, KINDS)
        check_integer("timesteps", timesteps)
        timesteps = int(timesteps)
        if timesteps > TIMESTEPS_MAX:
            raise ValueError(f"timesteps: got {timesteps}, needs at most {TIMESTEPS_MAX}")
        if kind == "cosine":
            if beta_start is not None or beta_end is not None:
                raise ValueError("beta_start, beta_end: the cosine schedule takes none")
        elif kind == "constant":
            if beta_start is not None and beta_end is not None and beta_start != beta_end:
                raise ValueError(f"beta_start, beta_end: got {beta_start} and {beta_end}, needs one: all are the same")
            beta_start = beta_end = next((b for b in (beta_end, beta_start) if b is not None), 0.035)
        else:
            beta_start = 1e-4 if beta_start is None else beta_start
            beta_end = 0.02 if beta_end is None else beta_end
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if beta is not None and not (isinstance(beta, Real) and 0 < beta < 1):
                raise ValueError(f"{name}: got {beta!r}, needs 0 < {name} < 1")
        start, end = (None if beta is None else float(beta) for beta in (beta_start, beta_end))
        if kind == "context_unet":
            grid = np.linspace(start, end, timesteps + 1)
            values = np.exp(np.cumsum(np.log1p(-grid)))
            values[0] = 1.0
            betas = np.concatenate([[0.0], grid[1:]])
        else:
            betas = np.concatenate([[0.0], _beta_grid(kind, timesteps, start, end)])
            values = np.cumprod(1 - betas)
        if values[1] == 1:
            raise ValueError(f"beta_start: got {start}, needs more than 1e-16: 1 - beta is 1 in float64")
        _warn_of_signal(kind, timesteps, values[-1])
        return cls(kind, timesteps, start, end, *map(torch.from_numpy, (betas, 1 - betas, values)))

    @classmethod
    def from_alpha_bars(cls, alpha_bars: Sequence[float] | np.ndarray | Tensor) -> "NoiseSchedule":
        """The schedule of these values for t = 0..T (the first is 1), or for t = 1..T as other libraries keep them.

        They fall from one to the next and lie in [0, 1]; betas follow. Raises ValueError, warns as `make` does.
        """
        held = alpha_bars.detach().cpu().numpy() if isinstance(alpha_bars, Tensor) else alpha_bars
        values = np.array(held, dtype=np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"alpha_bars: got shape {list(values.shape)}, needs [T+1] or [T]")
        if values[0] != 1.0:
            values = np.concatenate([[1.0], values])
        if len(values) < 2 or not np.isfinite(values).all() or (np.diff(values) >= 0).any() or values[-1] < 0:
            raise ValueError(f"alpha_bars: got {values[:4].tolist()}.., needs numbers that fall from 1, none below 0")
        alphas = np.concatenate([[1.0], values[1:] / values[:-1]])
        count = len(values) - 1
        _warn_of_signal(GIVEN, count, values[-1])
        return cls(GIVEN, count, None, None, *map(torch.from_numpy, (1 - alphas, alphas, values)))

    def alpha_bar(self, t: float) -> float:
        """alpha_bars at any t in 0..T; between whole ones log SNR is interpolated, beside 0 and 1 alpha_bar itself."""
        if not 0 <= t <= self.timesteps:
            raise ValueError(f"t: got {t}, needs 0..{self.timesteps}")
        low = int(t)
        if t == low:
            return float(self.alpha_bars[low])
        share, (a, b) = t - low, self.alpha_bars[low : low + 2].tolist()
        if a == 1 or b == 0:
            return a + share * (b - a)
        log_snr = (1 - share) * math.log(a / (1 - a)) + share * math.log(b / (1 - b))
        return 1 / (1 + math.exp(-log_snr))

    def config(self) -> dict[str, Any]:
        """The arguments that `make` needs to build this schedule again."""
        described = {"kind": self.kind, "timesteps": self.timesteps}
        if self.kind == GIVEN:
            return described | {"alpha_bars": self.alpha_bars.tolist()}
        return described | {"beta_start": self.beta_start, "beta_end": self.beta_end}
