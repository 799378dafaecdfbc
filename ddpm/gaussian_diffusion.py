"""GaussianDiffusion: training and sampling by the interface of denoising_diffusion_pytorch, on our tables and noise.

Its state dict is theirs by name and shape. There t counts from 0: its index t is our timestep t + 1. Losses and samples
are made of the noise contract (`kernels.philox`): streams 2 (noise), 3 (t), 8 (self-conditioning), 9 (offset noise).
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm.beta_schedules import buffers_of, schedule_of
from ddpm.errors import check_choice, check_integer, check_number
from ddpm.inference import kept_form
from ddpm.networks.protocol import broadcast, predict
from ddpm.networks.unet import sides_of
from ddpm.noise import Noise, PhiloxNoise
from ddpm.runs import free_folder, held, make_config, start_run
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import make_table
from ddpm.table import FLOAT64_MAX, StepTable
from ddpm.training.objective import for_half, min_snr_weights, per_sample_loss
from ddpm.trajectory import Trajectory
from kernels import backend, philox
from kernels.philox import Stream

PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
LOSSES = {"l1": "l1", "l2": "mse", "huber": "huber"}


def sampling_options(steps: int | None, eta: float = 0.0) -> dict[str, Any]:
    """Of `make_table`, but the prediction: DDIM in so many steps, or ancestral for None."""
    if steps is None:
        return {"solver": "ddpm", "clip": 1.0}
    more = {"eta": float(eta), "rederive": True, "spacing": "lucidrains"}
    return {"solver": "ddim", "steps": int(steps), "clip": 1.0} | more


class ModelPrediction(NamedTuple):
    """What a network's output says of the noise and of x0, each [n, C, H, W]."""

    pred_noise: Tensor
    pred_x_start: Tensor


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


class GaussianDiffusion(nn.Module):
    """A diffusion around a network: `loss = diffusion(images)`, `diffusion.sample(batch_size=16)`.

    Args:
        model: a `Unet`, or a module with `channels`, `out_dim`, `self_condition` and their forward(x, t, ...).
        image_size: side of the images, or (height, width). timesteps: T. objective: what the network predicts.
        sampling_timesteps: fewer than T: DDIM in so many steps, with ddim_sampling_eta; None: ancestral, in T.
        beta_schedule: sigmoid, cosine or linear, with schedule_fn_kwargs.
        auto_normalize: whether images are 0..1 outside; False: -1..1 as inside.
        offset_noise_strength: of noise that is one number a channel. min_snr_loss_weight: weights of the loss clipped
            at min_snr_gamma. loss_type: l2, l1 or huber.
        seed: of what training draws. `next_sample` counts the images drawn for: what a resumed training sets.
    immiscible is not built and refused. Raises ValueError or TypeError naming the argument.

    Samples of one seed are the same at every call, on every engine and in every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, float] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
        loss_type: str = "l2",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("channels", "out_dim", "self_condition"):
            if not hasattr(model, name):
                raise TypeError(f"model: {type(model).__name__} has no {name}, needs a Unet or what is like it")
        if model.self_condition:
            try:
                inspect.signature(model.forward).bind(*range(4))
            except TypeError as error:
                needs = "forward(x, time, x_self_cond=None, x0_previous=None): engines give the estimate last"
                raise TypeError(f"model: {type(model).__name__} has self_condition, needs {needs}") from error
        if model.out_dim != model.channels:
            raise ValueError(f"model: its out_dim is {model.out_dim}, needs its channels, {model.channels}")
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError("model: has a random or learned embedding of time, needs the sinusoidal one")
        if immiscible:
            raise ValueError(f"immiscible: got {immiscible!r}, which is not built, needs False")
        self.image_size = sides_of(image_size)
        factor = getattr(model, "downsample_factor", 1)
        if any(side % factor for side in self.image_size):
            raise ValueError(f"image_size: got {image_size}, needs a multiple of {factor} for this network")
        check_choice("objective", objective, PREDICTIONS)
        check_choice("loss_type", loss_type, LOSSES)
        check_number("ddim_sampling_eta", ddim_sampling_eta, 0, 1, "0..1")
        check_number("offset_noise_strength", offset_noise_strength, 0, FLOAT64_MAX, "a finite number >= 0")
        check_number("min_snr_gamma", min_snr_gamma, math.ulp(0), FLOAT64_MAX, "a finite number > 0")
        philox.check_seed(seed)
        self._schedule = schedule_of(beta_schedule, timesteps, schedule_fn_kwargs or {})
        self.num_timesteps = self._schedule.timesteps
        self.sampling_timesteps = self.num_timesteps if sampling_timesteps is None else sampling_timesteps
        check_integer("sampling_timesteps", self.sampling_timesteps)
        if self.sampling_timesteps > self.num_timesteps:
            needs = f"1..{self.num_timesteps} (timesteps)"
            raise ValueError(f"sampling_timesteps: got {sampling_timesteps}, needs {needs}")
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        self.model, self.channels, self.self_condition = model, model.channels, model.self_condition
        self.objective, self.loss_type, self.ddim_sampling_eta = objective, loss_type, ddim_sampling_eta
        self.auto_normalize, self.offset_noise_strength = auto_normalize, offset_noise_strength
        self.seed, self.next_sample = seed, 0

        gamma = min_snr_gamma if min_snr_loss_weight else math.inf
        buffers = buffers_of(self._schedule)
        buffers["loss_weight"] = min_snr_weights(self._schedule.alpha_bars, self.prediction, gamma)[1:]
        for name, values in buffers.items():
            self.register_buffer(name, values.to(torch.float32))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.betas.device

    @property
    def prediction(self) -> str:
        """The objective by the name that tables know: eps, v or x0."""
        return PREDICTIONS[self.objective]

    @property
    def schedule(self) -> NoiseSchedule:
        """That of the present buffers: a state dict that was loaded brings its own."""
        held = self.alphas_cumprod.float().cpu()
        if not torch.equal(held, self._schedule.alpha_bars[1:].float()):
            self._schedule = NoiseSchedule.from_alpha_bars(held)
        return self._schedule

    def sampling(self, ddim: bool | None = None) -> dict[str, Any]:
        """The options of `table`, but the prediction."""
        ddim = self.is_ddim_sampling if ddim is None else ddim
        return sampling_options(self.sampling_timesteps if ddim else None, self.ddim_sampling_eta)

    def table(self, ddim: bool | None = None) -> StepTable:
        """What `sample` runs. ddim: DDIM rather than ancestral; None: by sampling_timesteps."""
        return make_table(self.schedule, prediction=self.prediction, **self.sampling(ddim))

    def tell_model(self, shape: tuple[int, ...] | None = None) -> None:
        """Make the model say what a network states: a U-Net draws any size, and another module may say nothing."""
        self.model.sample_shape = shape or (self.channels, *self.image_size)
        if getattr(self.model, "time", None) != "index":
            self.model.time = "index"

    def save_run(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write network, schedule and sampling options as a run, which `ddpm sample` and `ddpm-export` take.

        Raises BadInput for a folder that cannot be written to, or that holds a run without `overwrite`; ValueError for
        a network that has no name (see `ddpm.networks`).
        """
        folder = Path(folder)
        self.tell_model()
        config = make_config(self.model, self.schedule, self.prediction, sampling=self.sampling())
        with held(folder):
            free_folder(folder, overwrite)
            start_run(folder, config, self.model)

    # --- between x_t, x0, noise and v; t: int64 [n], from 0 -------------------------------------------------------

    def normalize(self, images: Tensor) -> Tensor:
        """From what images are outside to -1..1."""
        return images * 2 - 1 if self.auto_normalize else images

    def unnormalize(self, x: Tensor) -> Tensor:
        """From -1..1 to what images are outside."""
        return (x + 1) * 0.5 if self.auto_normalize else x

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A buffer at t: [n, 1, 1, 1]."""
        if t.dtype != torch.int64 or t.shape != like.shape[:1]:
            raise ValueError(f"t: got {t.dtype} {list(t.shape)}, needs int64 [{len(like)}], a timestep for each row")
        backend.check_range("t", t, 0, self.num_timesteps - 1)
        return broadcast(getattr(self, name)[t], like)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 of x_t and noise."""
        of_noise = self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - of_noise * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Noise of x_t and x0."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - x0) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v (Salimans & Ho 2022) of x0 and noise."""
        of_noise = self._at("sqrt_alphas_cumprod", t, x_start)
        return of_noise * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 of x_t and v."""
        of_v = self._at("sqrt_one_minus_alphas_cumprod", t, x_t)
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - of_v * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of q(x_{t-1} | x_t, x0): mean [n, C, H, W], variance and its logarithm [n, 1, 1, 1]."""
        of_x0, of_x = (self._at(f"posterior_mean_coef{k}", t, x_t) for k in (1, 2))
        variance, logarithm = (self._at(f"posterior_{k}", t, x_t) for k in ("variance", "log_variance_clipped"))
        return of_x0 * x_start + of_x * x_t, variance, logarithm

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """What the network says. clip_x_start: to -1..1; the network's own noise stays unless it is re-derived."""
        output = predict(self.model, x, t, None, x_self_cond)
        start = {"pred_noise": self.predict_start_from_noise, "pred_v": self.predict_start_from_v}
        x0 = start[self.objective](x, t, output) if self.objective in start else output
        x0 = x0.clamp(-1, 1) if clip_x_start else x0
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x0)
        return ModelPrediction(self.predict_noise_from_start(x, t, x0), x0)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`q_posterior` of what the network says x0 is, and that x0. clip_denoised: to -1..1."""
        x0 = self.model_predictions(x, t, x_self_cond, clip_denoised).pred_x_start
        return *self.q_posterior(x0, x, t), x0

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        *,
        noise: Noise | None = None,
        seed: int = 0,
        first_sample: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """A step of `p_sample_loop`, for loops of one's own: (x_{t-1}, x0), each like x. The last one has no noise."""
        times = torch.full((len(x),), t, device=x.device)
        mean, _, logarithm, x0 = self.p_mean_variance(x, times, x_self_cond)
        if t == 0:
            return mean, x0
        draw = PhiloxNoise(seed) if noise is None else noise
        samples = torch.arange(first_sample, first_sample + len(x), device=x.device)
        z = draw(samples, t + 1, Stream.SAMPLING, tuple(x.shape[1:])).to(x)
        return mean + (0.5 * logarithm).exp() * z, x0

    # --- training -------------------------------------------------------------------------------------------------

    def _take(self, n: int) -> Tensor:
        """Indices of the next n images of training, int64 [n]; ranks of torch.distributed take turns."""
        if getattr(self, "_is_replica", False):  # whose count is thrown away: every step would draw the same
            needs = "samples=, or DistributedDataParallel (torchrun)"
            raise RuntimeError(f"DataParallel: its replicas cannot count the images drawn for, needs {needs}")
        here = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
        first = self.next_sample + rank * n
        self.next_sample += size * n
        return torch.arange(first, first + n, device=self.device)

    def _noise(self, like: Tensor, samples: Tensor, stream: int = Stream.TRAINING_NOISE) -> Tensor:
        return philox.normal_like(like, self.seed, samples, stream, like.dtype)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(ab) x0 + sqrt(1 - ab) noise, like x_start; noise None: the next of training's."""
        noise = self._noise(x_start, self._take(len(x_start))) if noise is None else noise
        of_noise = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return self._at("sqrt_alphas_cumprod", t, x_start) * x_start + of_noise * noise

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        samples: Tensor | None = None,
    ) -> Tensor:
        """The loss of images x_start [n, C, H, W] in -1..1 at t: a scalar, or [n] for loss_reduction "none".

        samples: int64 [n], which numbers the noise contract draws; None: the next ones.
        """
        check_choice("loss_reduction", loss_reduction, ("mean", "none"))
        samples = self._take(len(x_start)) if samples is None else samples
        noise = self._noise(x_start, samples) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength:
            offset = self._noise(x_start[:, :, :1, :1], samples, Stream.OFFSET)
            noise = noise + strength * offset
        x_t, previous = self.q_sample(x_start, t, noise), None
        if self.self_condition:
            with torch.no_grad():
                previous = for_half(self.model_predictions(x_t, t).pred_x_start, self.seed, samples)
            torch.clear_autocast_cache()  # of weights that were cast without gradients
        output = predict(self.model, x_t, t, None, previous)
        target = {"pred_noise": noise, "pred_x0": x_start}.get(self.objective)
        target = self.predict_v(x_start, t, noise) if target is None else target
        loss = per_sample_loss(LOSSES[self.loss_type], output.to(target.dtype), target) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(
        self,
        img: Tensor,
        *arguments: Any,
        times: Tensor | None = None,
        samples: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of images [n, C, H, W], 0..1 with auto_normalize. times: int64 [n] from 0; None: uniform.

        The rest is that of `p_losses`. Raises TypeError or ValueError for what are no such images.
        """
        needs = [self.channels, *self.image_size]
        if not img.is_floating_point():
            raise TypeError(f"img: got {img.dtype}, needs floating point (0..1)")
        if list(img.shape[1:]) != needs:
            raise ValueError(f"img: got shape {list(img.shape)}, needs [n, {', '.join(map(str, needs))}]")
        samples = self._take(len(img)) if samples is None else samples
        if times is None:
            times = philox.training_timesteps(self.seed, samples, self.num_timesteps) - 1
        return self.p_losses(self.normalize(img), times, *arguments, samples=samples, **options)

    # --- sampling -------------------------------------------------------------------------------------------------

    def _draw(
        self,
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
        """A trajectory of the table: [n, C, H, W], or [n, rows + 1, C, H, W], in -1..1."""
        if noise is not None and not callable(noise):
            needs = "a function noise(samples, step, stream, shape) -> [n, *shape]"
            raise TypeError(f"noise: got a {type(noise).__name__}, needs {needs}")
        n, *image = shape
        self.tell_model(tuple(image))
        trajectory = Trajectory(self.model, self.schedule, table, engine=engine, dtype=dtype, form=kept_form)
        given = {"seed": seed, "first_sample": first_sample, "noise": noise, "x_T": x_T}
        if not return_all_timesteps:
            return trajectory(n, **given)
        samples = torch.arange(first_sample, first_sample + n, device=self.device)
        draw = PhiloxNoise(seed) if noise is None else noise
        start = draw(samples, 0, Stream.INITIAL, tuple(image)) if x_T is None else x_T.to(self.device)
        path = _Path(table, samples, start.to(torch.float32), draw)
        images = trajectory(n, batch_size=n, callback=path, **given)
        return torch.stack([*path.states[:-1], images], dim=1)

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """Images [n, C, H, W], 0..1 with auto_normalize: a `Trajectory` of `table()`.

        Args:
            batch_size: how many, n. return_all_timesteps: [n, S + 1, C, H, W], from pure noise to the images.
            how: x_T [n, C, H, W] to start from; noise(samples, step, stream, shape) -> [n, *shape] instead of the
                contract's; seed (0), first_sample (0), engine ("auto"), dtype (float32): see `Trajectory`.
        """
        check_integer("batch_size", batch_size)
        shape = (batch_size, self.channels, *self.image_size)
        return self.unnormalize(self._draw(self.table(), shape, return_all_timesteps, **how))

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """Ancestral sampling in T steps, whatever sampling_timesteps is. shape: [n, C, H, W]; the rest as `sample`."""
        return self.unnormalize(self._draw(self.table(ddim=False), shape, return_all_timesteps, **how))

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """DDIM in sampling_timesteps steps. shape: [n, C, H, W]; the rest as `sample`."""
        return self.unnormalize(self._draw(self.table(ddim=True), shape, return_all_timesteps, **how))

    @torch.no_grad()
    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, *, seed: int = 0, **how: Any
    ) -> Tensor:
        """Images between x1 and x2 [n, C, H, W] in -1..1, which the result is in too.

        Both are noised to t (from 0, default the last), mixed as (1 - lam) x1 + lam x2, and sampled from t - 1 down.
        Their noise is that of the samples 0..n-1 and n..2n-1 in stream 0; how: as in `sample`, but x_T.
        """
        t = self.num_timesteps - 1 if t is None else t
        check_integer("t", t, 0)
        if x1.shape != x2.shape or t >= self.num_timesteps:
            got = f"{list(x1.shape)}, {list(x2.shape)}, {t}"
            raise ValueError(f"x1, x2, t: got {got}, needs equal shapes and 0..{self.num_timesteps - 1}")
        n, *image = x1.shape
        draw = how.get("noise") or PhiloxNoise(seed)
        noise = draw(torch.arange(2 * n, device=x1.device), 0, Stream.INITIAL, tuple(image)).to(x1).chunk(2)
        times = torch.full((n,), t, device=x1.device)
        x = (1 - lam) * self.q_sample(x1, times, noise[0]) + lam * self.q_sample(x2, times, noise[1])
        if t == 0:
            return x
        return self._draw(self.table(ddim=False).from_row(self.num_timesteps - t), x.shape, x_T=x, seed=seed, **how)
