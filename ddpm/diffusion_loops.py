"""How a GaussianDiffusion is sampled: by a Trajectory, or step by step where a subclass has steps of its own."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm.inference import kept_form
from ddpm.noise import Noise, PhiloxNoise
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory, evaluating
from kernels.philox import Stream

if TYPE_CHECKING:
    from ddpm.gaussian_diffusion import GaussianDiffusion

logger = logging.getLogger("ddpm")

# What a step is made of, and so what a subclass may do otherwise: no table has it.
OF_DDIM = ("predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start", "model_predictions")
STEPS = (*OF_DDIM, "q_posterior", "p_mean_variance", "p_sample")


def sampling_options(steps: int | None, eta: float = 0.0) -> dict[str, Any]:
    """Of `make_table`, but the prediction: DDIM in so many steps, or ancestral for None."""
    if steps is None:
        return {"solver": "ddpm", "clip": 1.0}
    more = {"eta": float(eta), "rederive": True, "spacing": "lucidrains"}
    return {"solver": "ddim", "steps": int(steps), "clip": 1.0} | more


def own_steps(diffusion: "GaussianDiffusion", is_ddim: bool = False) -> list[str]:
    """Those methods of a step, or of DDIM's, that are not GaussianDiffusion's."""
    return [name for name in (OF_DDIM if is_ddim else STEPS) if diffusion.has_own(name)]


def warn_of_own_steps(diffusion: "GaussianDiffusion", what: str) -> None:
    """Say that a run, of which `what` makes one, is sampled by tables, without a subclass's steps."""
    if own := own_steps(diffusion):
        logger.warning("%s: runs are sampled without %s of %s", what, ", ".join(own), type(diffusion).__name__)


class _Path:
    """A callback that keeps every state: of tables that read neither m nor memory, x <- c2 x + c3 x0 + c6 z."""

    def __init__(self, table: StepTable, samples: Tensor, x: Tensor, noise: Noise) -> None:
        self.table, self.samples, self.noise, self.states = table, samples, noise, [x]
        self.rows, self.steps = table.coefficients.tolist(), table.noise_steps.tolist()

    def __call__(self, row: int, x0: Tensor) -> None:
        if len(x0) != len(self.samples):  # a chunk that ran out of memory begins again as two
            raise torch.OutOfMemoryError("return_all_timesteps: ran out of memory, needs a smaller batch_size")
        _, _, of_x, of_x0, *_, of_z = self.rows[row]
        x = of_x * self.states[-1] + of_x0 * x0
        if of_z:
            x = x + of_z * self.noise(self.samples, self.steps[row], Stream.SAMPLING, tuple(x.shape[1:])).to(x)
        self.states.append(x)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _taken(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those options that a function takes. Raises ValueError for another one that says something."""
    taken = {name: value for name, value in options.items() if accepts(function, name)}
    for name in options.keys() - taken.keys():
        if options[name]:
            found = f"got {options[name]!r}, but {function.__qualname__} takes none"
            raise ValueError(f"{name}: {found}: let it, or leave it out")
    return taken


def estimate(previous: Tensor | None) -> dict[str, Tensor]:
    """The argument by which a step gets it, if there is one: steps of former versions take another in its place."""
    return {} if previous is None else {"x_self_cond": previous}


def _by_steps(diffusion: "GaussianDiffusion", table: StepTable, states: list[Tensor], draw: Noise, how: dict) -> Tensor:
    """The last of the states, which grow by one for each row of the table: of ddpm by p_sample, else as DDIM does."""
    (x,), x0 = states, None
    first, last = how["first_sample"], len(table) - 1
    ancestral = table.solver == "ddpm"
    clipped = {"clip_x_start": True, "rederive_pred_noise": True}
    clipped = {name: value for name, value in clipped.items() if accepts(diffusion.model_predictions, name)}
    options = _taken(diffusion.p_sample, how) if ancestral else clipped
    samples = torch.arange(first, first + len(x), device=x.device)
    for row, t in enumerate(table.timesteps.tolist()):
        previous = estimate(x0 if diffusion.self_condition else None)
        if ancestral:
            x, x0 = diffusion.p_sample(x, t - 1, **previous, **options)
        else:
            times = torch.full((len(x),), t - 1, device=x.device)
            told = diffusion.model_predictions(x, times, **previous, **options)
            x = x0 = told.pred_x_start
            if row < last:
                signal = float(diffusion.schedule.alpha_bars[table.timesteps[row + 1]])
                of_z = float(table.coefficients[row, 6])
                x = math.sqrt(signal) * x0 + math.sqrt(max(1 - signal - of_z**2, 0.0)) * told.pred_noise
                if of_z:
                    step = int(table.noise_steps[row])
                    x = x + of_z * draw(samples, step, Stream.SAMPLING, tuple(x.shape[1:])).to(x)
        states.append(x)
    return x


def draw(
    diffusion: "GaussianDiffusion",
    table: StepTable,
    shape: Sequence[int],
    return_all_timesteps: bool = False,
    *,
    x_T: Tensor | None = None,  # noqa: N803 (its name in the papers)
    noise: Noise | None = None,
    seed: int = 0,
    first_sample: int = 0,
    engine: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A run of the table: [n, C, H, W], or [n, rows + 1, C, H, W], in -1..1. The options are those of `sample`."""
    if noise is not None and not callable(noise):
        needs = "a function noise(samples, step, stream, shape) -> [n, *shape]"
        raise TypeError(f"noise: got a {type(noise).__name__}, needs {needs}")
    n, *image = shape
    diffusion.tell_model(tuple(image))
    own = own_steps(diffusion, table.solver != "ddpm")
    trajectory = Trajectory(diffusion.model, diffusion.schedule, table, engine=engine, dtype=dtype, form=kept_form)
    given = {"seed": seed, "first_sample": first_sample, "noise": noise}
    if not own and not return_all_timesteps:
        return trajectory(n, x_T=x_T, **given)
    samples = torch.arange(first_sample, first_sample + n, device=diffusion.device)
    source = PhiloxNoise(seed) if noise is None else noise
    start = source(samples, 0, Stream.INITIAL, tuple(image)) if x_T is None else x_T
    start = start.to(diffusion.device, torch.float32)
    if own:
        what = f"{type(diffusion).__name__} has {', '.join(own)} of its own"
        if engine not in ("auto", "eager") or dtype != torch.float32:
            raise ValueError(f"engine: got {engine} in {dtype}, but {what}, which is called step by step, needs eager")
        logger.info("%s: sampled step by step, eagerly", what)
        states = [start]
        with torch.no_grad():
            images = evaluating(diffusion.model, _by_steps, diffusion, table, states, source, given)
        return torch.stack(states, dim=1) if return_all_timesteps else images
    path = _Path(table, samples, start, source)
    images = trajectory(n, batch_size=n, callback=path, x_T=x_T, **given)
    return torch.stack([*path.states[:-1], images], dim=1)
