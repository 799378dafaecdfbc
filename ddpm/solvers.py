"""Solvers are tables: every sampler is one row of seven numbers per step, and one kernel runs any of them.

    x0    = c0 x + c1 m ;  clamp to [-clip, clip] if clip is set         m = network output
    x_new = c2 x + c3 x0 + c4 m + c5 x0_previous + c6 z                  x0_previous <- x0

A solver is one function under `@solver("name")`: it gets alpha_bars at its timesteps and at 0, what the network
predicts and the options that its signature names, and returns a row for every step; a step of several rows has
`Further` ones after it. Below, a = alpha_bars[t], s = alpha_bars of the next (smaller) timestep, sigma^2 = 1 - a.
Everything is float64.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ddpm.errors import check_choice, check_integer, check_number, register
from ddpm.predictions import eps_of, x0_of
from ddpm.schedule import NoiseSchedule
from ddpm.table import COLUMNS, PREDICTIONS, VISITS_MAX, StepTable, noise_step
from kernels.philox import is_integer

# Keeps divisions finite where alpha_bar underflows; such tables are refused by the range of float32.
ALPHA_BAR_MIN = 1e-300
VARIANCES = ("posterior", "beta")
SPACINGS = ("trailing", "leading", "linspace", "lucidrains")
OFFSET = re.compile(r"leading\+(\d{1,7})")


class Further(NamedTuple):
    """A row that continues the step of the row before it, evaluated at the `at`-th timestep of the grid."""

    coefficients: list[float]
    at: int


Rows = Sequence[list[float] | Further]
SOLVERS: dict[str, Callable[..., Rows]] = {}
# What a run's stored options lend to another solver than its own.
SHARED_OPTIONS = ("prediction", "clip", "spacing")


def solver(name: str) -> Callable[[Callable[..., Rows]], Callable[..., Rows]]:
    """Register function(alpha_bars, prediction, *, own options) under a name, for every engine and command."""
    return register(SOLVERS, name, "solver")


def options_of(name: str) -> tuple[str, ...]:
    """What a solver takes beside steps, prediction, clip and spacing. Raises ValueError for an unknown one."""
    check_choice("solver", name, SOLVERS)
    parameters = inspect.signature(SOLVERS[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def timestep_grid(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """The timesteps visited, int64 [S], descending: S = 1 always starts at T.

    trailing: round(T - k T/S); leading: (T//S) k + 1, S must divide T; linspace: round(linspace(0, T-1, S)) + 1
    (Lin et al. 2024, table 2, shifted to 1..T); lucidrains: linspace(-1, T-1, S+1) truncated, + 1, in float32 as
    denoising_diffusion_pytorch computes it; leading+K: (T//S) k + 1 + K for any S, also 1, diffusers' steps_offset.
    Raises ValueError for S outside 1..T or an unknown spacing.
    """
    if not is_integer(steps) or not 1 <= steps <= timesteps:
        raise ValueError(f"steps: got {steps!r}, needs an integer in 1..{timesteps} (the schedule's timesteps)")
    offset = OFFSET.fullmatch(spacing) if isinstance(spacing, str) else None
    check_choice("spacing", "leading" if offset else spacing, SPACINGS)
    k = np.arange(steps)
    if offset:
        grid = ((timesteps // steps) * k + 1 + int(offset[1]))[::-1]
        if grid[0] > timesteps:
            raise ValueError(f"spacing: got {spacing} with {steps} steps, which begin at {grid[0]} > T = {timesteps}")
    elif steps == 1:
        grid = np.array([timesteps])
    elif spacing == "trailing":
        grid = np.round(timesteps - k * timesteps / steps)
    elif spacing == "leading":
        if timesteps % steps:
            raise ValueError(f"steps: got {steps}, needs a divisor of {timesteps} with spacing 'leading'")
        grid = ((timesteps // steps) * k + 1)[::-1]
    elif spacing == "linspace":
        grid = (np.round(np.linspace(0, timesteps - 1, steps)) + 1)[::-1]
    else:
        grid = torch.linspace(-1, timesteps - 1, steps + 1, dtype=torch.float32, device="cpu").long().numpy()[:0:-1] + 1
    return grid.astype(np.int64)


def to_x0(prediction: str, a: float) -> tuple[float, float]:
    """(c0, c1) of x0 = c0 x + c1 m."""
    of = partial(x0_of, prediction, signal=math.sqrt(a), noise=math.sqrt(1 - a))
    return of(1.0, 0.0), of(0.0, 1.0)


def to_eps(prediction: str, a: float) -> tuple[float, float]:
    """(p, q) of eps = p x + q m: the network's own noise, whatever becomes of x0."""
    of = partial(eps_of, prediction, signal=math.sqrt(a), noise=math.sqrt(1 - a))
    return of(1.0, 0.0), of(0.0, 1.0)


@solver("ddpm")
def ddpm(alpha_bars: list[float], prediction: str, *, variance: str = "posterior", resample: int = 1) -> Rows:
    """q(x_s | x_t, x0), Ho et al. 2020, equations 6 and 7; variance of its noise: `posterior` or the larger `beta`.

    resample: how often each step but the last is made; after each but the last time it is undone by the forward process
    (RePaint, Lugmayr et al. 2022, jump length 1), so that what is given has its effect on what is not. Down and up
    again is one row, whose two noises are one.
    """
    check_choice("variance", variance, VARIANCES)
    check_integer("resample", resample, 1, VISITS_MAX)
    rows: list[list[float] | Further] = []
    last = len(alpha_bars) - 2
    for i, (a, s) in enumerate(pairwise(alpha_bars)):
        alpha, beta = a / s, 1 - a / s
        noise = beta if variance == "beta" else beta * (1 - s) / (1 - a)
        c2, c3 = math.sqrt(alpha) * (1 - s) / (1 - a), math.sqrt(s) * beta / (1 - a)
        down = [*to_x0(prediction, a), c2, c3, 0.0, 0.0, math.sqrt(noise)]
        up = math.sqrt(alpha)
        back = [*down[:2], up * c2, up * c3, 0.0, 0.0, math.sqrt(alpha * noise + beta)]
        first, *further = [*[back] * (resample - 1 if i < last else 0), down]
        rows += [first, *(Further(row, i) for row in further)]
    return rows


@solver("ddim")
def ddim(
    alpha_bars: list[float],
    prediction: str,
    *,
    eta: float = 0.0,
    rederive: bool = False,
    ends: list[float] | None = None,
) -> Rows:
    """Song, Meng, Ermon 2021, equations 12 and 16, with the network's own eps; eta: noise, 0 (deterministic) to 1.

    rederive: eps is derived again from x and the clipped x0, (x - sqrt(a) x0) / sqrt(1 - a). ends: alpha_bars where the
    steps end, if not where the next ones begin, see `make_table`.
    """
    eta = check_number("eta", eta, 0, 1, "0 <= eta <= 1")
    if not isinstance(rederive, bool):
        raise ValueError(f"rederive: got {rederive!r}, needs True or False")
    rows = []
    for a, s in zip(alpha_bars[:-1], ends or alpha_bars[1:], strict=True):
        noise = eta * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
        direction = math.sqrt(max(1 - s - noise**2, 0.0))
        p, q = to_eps(prediction, a)
        of_x, of_x0, of_m = direction * p, math.sqrt(s), direction * q
        if rederive:
            of_x, of_m = direction / math.sqrt(1 - a), 0.0
            of_x0 -= of_x * math.sqrt(a)
        rows.append([*to_x0(prediction, a), of_x, of_x0, of_m, 0.0, noise])
    return rows


@solver("dpmpp_2m")
def dpmpp_2m(alpha_bars: list[float], prediction: str) -> Rows:
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
        rows.append([*to_x0(prediction, a), c2, weight * (1 + memory), 0.0, -weight * memory, 0.0])
        h_previous = h
    return [*rows, [*to_x0(prediction, last[0]), 0.0, 1.0, 0.0, 0.0, 0.0]]


@solver("pc")
def predictor_corrector(
    alpha_bars: list[float], prediction: str, *, variance: str = "posterior", corrections: int = 1, snr: float = 0.16
) -> Rows:
    """An ancestral step, then Langevin steps that draw x to its distribution where it landed (Song et al. 2021, SDE).

    x <- x + h score + sqrt(2 h) z with score = -eps / sigma and h = 2 (snr sigma)^2: algorithm 5 of that paper with
    the expectation of its norms' ratio, since a table does not depend on the pictures, and without its factor alpha_t,
    which is nearly 1. corrections: such steps after each step but the last.
    """
    check_integer("corrections", corrections, 1, VISITS_MAX - 1)
    snr = check_number("snr", snr, 0, 1, "0 <= snr <= 1")
    *inner, last = ddpm(alpha_bars, prediction, variance=variance)
    rows: list[list[float] | Further] = []
    for i, row in enumerate(inner, start=1):
        s, sigma = alpha_bars[i], math.sqrt(1 - alpha_bars[i])
        h, (p, q) = 2 * (snr * sigma) ** 2, to_eps(prediction, s)
        correction = [*to_x0(prediction, s), 1 - h * p / sigma, 0.0, -h * q / sigma, 0.0, math.sqrt(2 * h)]
        rows += [row, *[Further(correction, i)] * corrections]
    return [*rows, last]


def _interval(bounds: Sequence[float]) -> tuple[float, float]:
    """Two shares of T. Raises ValueError."""
    try:
        low, high = (check_number("", bound, 0, 1, "") for bound in bounds)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not low < high:
        raise ValueError(f"guidance_interval: got {str(bounds)[:80]}, needs low,high with 0 <= low < high <= 1")
    return low, high


def given(options: Mapping[str, object]) -> dict[str, object]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def carried_over(stored: Mapping[str, object], asked: Mapping[str, object]) -> dict[str, object]:
    """A run's stored options overridden by what is asked for; another solver takes over SHARED_OPTIONS alone."""
    stored, asked = given(stored), given(asked)
    if asked.get("solver", stored["solver"]) != stored["solver"]:
        stored = {name: stored[name] for name in SHARED_OPTIONS if name in stored}
    return stored | asked


def make_table(
    schedule: NoiseSchedule,
    solver: str,
    steps: int | None = None,
    *,
    eta: float | None = None,
    variance: str | None = None,
    prediction: str | None = "eps",
    clip: float | None = None,
    spacing: str | None = None,
    guidance_interval: Sequence[float] | None = None,
    **options: object,
) -> StepTable:
    """The table of a sampler on a schedule. An option that is None is not given.

    Args:
        schedule: only its alpha_bars are used. steps: S in 1..T, default T.
        solver: `ddpm` (ancestral sampling), `ddim`, `dpmpp_2m`, `pc`, or another of SOLVERS.
        eta: of ddim, 0..1, default 0. variance: of ddpm, `posterior` (default) or `beta`. options: of other solvers;
            `ends` of ddim, 0 or 1: a step from t ends at max(t - T // S, ends), diffusers' rule, whatever comes next.
        prediction: what the network was trained to output: `eps`, `v` (Salimans & Ho 2022) or `x0`.
        clip: bound of x0, or None. spacing: of the timesteps, default trailing, see `timestep_grid`.
        guidance_interval: (low, high), shares of T: guidance acts where low < t / T <= high (Kynkaanniemi et al. 2024),
            elsewhere its weight is 1. None: everywhere.

    Raises: ValueError naming the argument; also for an option that is given and that the solver does not take.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: got a {type(schedule).__name__}, needs a NoiseSchedule")
    own = given({"eta": eta, "variance": variance} | options)
    # Tables are stored with numbers of Python's, not with NumPy's or tensors.
    own = {name: value.item() if hasattr(value, "item") else value for name, value in own.items()}
    taken = options_of(solver)
    for name in own:
        if name not in taken:
            known = ", ".join(("steps", "prediction", "clip", "spacing", "guidance_interval", *taken))
            raise ValueError(f"{name}: got {own[name]!r}, but solver {solver!r} takes only {known}")
    prediction = "eps" if prediction is None else prediction
    check_choice("prediction", prediction, PREDICTIONS)
    spacing = "trailing" if spacing is None else spacing
    steps = schedule.timesteps if steps is None else steps
    timesteps = timestep_grid(schedule.timesteps, steps, spacing)
    low, high = (0.0, 1.0) if guidance_interval is None else _interval(guidance_interval)
    levels = schedule.alpha_bars.clamp(min=ALPHA_BAR_MIN)
    alpha_bars, handed = levels[np.append(timesteps, 0)].tolist(), own
    if "ends" in own:
        if not is_integer(own["ends"]) or own["ends"] not in (0, 1):
            raise ValueError(f"ends: got {own['ends']!r}, needs 0 or 1")
        handed = own | {"ends": levels[np.maximum(timesteps - schedule.timesteps // steps, own["ends"])].tolist()}
    try:
        rows = SOLVERS[solver](alpha_bars, prediction, **handed)
    except ArithmeticError as error:
        raise ValueError(f"schedule: {solver!r} has no finite coefficients for it ({error}), needs others") from error
    begins = [not isinstance(row, Further) for row in rows]
    numbers = [row if first else row.coefficients for row, first in zip(rows, begins, strict=True)]
    if sum(begins) != len(timesteps) or not begins[0] or any(len(row) != COLUMNS for row in numbers):
        needs = f"{len(timesteps)} of {COLUMNS} numbers, and further ones after these"
        raise ValueError(f"solver: {solver!r} returned {len(rows)} rows, needs {needs}")
    counted = np.cumsum(begins) - 1
    timesteps = timesteps[[at if first else row.at for row, first, at in zip(rows, begins, counted, strict=True)]]
    coefficients = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    coefficients[-1, 6] = 0.0
    if not coefficients.to(torch.float32).isfinite().all():
        beyond = f"alpha_bars[{timesteps[0]}] = {alpha_bars[0]:.2g} needs coefficients beyond float32"
        raise ValueError(f"schedule: {beyond}; use fewer timesteps, smaller betas, or start later")
    if guidance_interval is not None:
        own["guidance_interval"] = [low, high]
    made_for = {"solver": solver, "steps": int(steps), "spacing": spacing, **own, "schedule": schedule.config()}
    seen: Counter[int] = Counter()
    noise_steps = []
    for t in timesteps.tolist():
        noise_steps.append(noise_step(t, seen[t]))
        seen[t] += 1
    tensor = partial(torch.tensor, device="cpu")
    more = {"noise_steps": tensor(noise_steps), "begins": tensor(begins), "made_for": made_for}
    # Divided, not multiplied: 57 / 100 is what 0.57 is.
    shares = torch.from_numpy(timesteps / schedule.timesteps)
    more["guidance_scale"] = ((low < shares) & (shares <= high)).to(torch.float64)
    return StepTable(torch.from_numpy(timesteps), coefficients, clip, prediction, **more)
