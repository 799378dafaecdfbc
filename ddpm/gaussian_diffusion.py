"""GaussianDiffusion: training and sampling by the interface of denoising_diffusion_pytorch, on our tables and noise.

Its state dict is theirs by name and shape. There t counts from 0: its index t is our timestep t + 1. Losses and samples
are made of the noise contract (`kernels.philox`): streams 2 (noise), 3 (t), 8 (self-conditioning), 9 (offset noise).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import diffusion_loops
from ddpm.beta_schedules import buffers_of, schedule_of
from ddpm.diffusion_formulas import Formulas, ModelPrediction
from ddpm.diffusion_loops import estimate, sampling_options
from ddpm.errors import check_choice, check_integer, check_number
from ddpm.former_arguments import only, renamed, understands
from ddpm.networks.protocol import predict
from ddpm.noise import Noise, PhiloxNoise
from ddpm.runs import free_folder, held, make_config, start_run
from ddpm.schedule import NoiseSchedule
from ddpm.sizes import sides_of
from ddpm.solvers import make_table
from ddpm.table import FLOAT64_MAX, StepTable
from ddpm.training.objective import for_half, min_snr_weights
from kernels import philox
from kernels.philox import Stream

PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
LOSSES = {"l1": "l1", "l2": "mse", "huber": "huber"}
FUNCTIONS = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class GaussianDiffusion(Formulas):
    """A diffusion around a network: `loss = diffusion(images)`, `diffusion.sample(batch_size=16)`.

    Args:
        model: a `Unet`, or a module with `channels`, `out_dim`, `self_condition` and their forward(x, t, ...).
        image_size: side of the images, or (height, width). timesteps: T. objective: what the network predicts.
        sampling_timesteps: fewer than T: DDIM in so many steps, with ddim_sampling_eta; None: ancestral, in T.
        beta_schedule: sigmoid, cosine or linear, with schedule_fn_kwargs.
        auto_normalize: whether images are 0..1 outside; False: -1..1 as inside.
        offset_noise_strength: of noise that is one number a channel. min_snr_loss_weight: weights of the loss clipped
            at min_snr_gamma. loss_type: l2, l1 or huber. p2_loss_weight_gamma, p2_loss_weight_k: as of former versions,
            weights (k + SNR)^-gamma whatever the objective (0 and 1 where the other is given).
        channels: of former versions: those of the model.
        seed: of what training draws. `next_sample` counts the images drawn for: what a resumed training sets.
    immiscible is not built and refused. Raises ValueError or TypeError naming the argument.

    Samples of one seed are the same at every call, on every engine and in every batch. A subclass with steps of its own
    (p_sample, model_predictions, ...) is sampled by them, eagerly. State dicts of former versions load, too.
    """

    @understands(
        denoise_fn=renamed("model"),
        num_diffusion_timesteps=renamed("timesteps"),
        betas=only(None, "beta_schedule, or a state dict with its own (load_state_dict)"),
    )
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
        p2_loss_weight_gamma: float | None = None,
        p2_loss_weight_k: float | None = None,
        channels: int | None = None,
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
        if channels not in (None, model.channels):
            raise ValueError(f"channels: got {channels}, but the model has {model.channels}, needs those or none")
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
        # A tensor: compiled training would be compiled again for each number.
        self.seed, self._present, self._drawn = seed, None, torch.zeros((), dtype=torch.int64, device="cpu")

        buffers = buffers_of(self._schedule)
        if p2_loss_weight_gamma is None and p2_loss_weight_k is None:
            gamma = min_snr_gamma if min_snr_loss_weight else math.inf
            buffers["loss_weight"] = min_snr_weights(self._schedule.alpha_bars, self.prediction, gamma)[1:]
        else:
            if min_snr_loss_weight:
                raise ValueError("min_snr_loss_weight: got True beside p2_loss_weight, needs one of the two")
            gamma, k = p2_loss_weight_gamma or 0.0, 1.0 if p2_loss_weight_k is None else p2_loss_weight_k
            gamma = check_number("p2_loss_weight_gamma", gamma, 0, FLOAT64_MAX, "a finite number >= 0")
            k = check_number("p2_loss_weight_k", k, math.ulp(0), FLOAT64_MAX, "a finite number > 0")
            a = buffers["alphas_cumprod"]
            buffers["loss_weight"] = (k + a / (1 - a)) ** -gamma
        for name, values in buffers.items():
            self.register_buffer(name, values.to(torch.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of former versions too, whose names it changes to the present ones in place."""
        for former, now in (("p2_loss_weight", "loss_weight"), ("denoise_fn.", "model.")):
            for name in [name for name in state_dict if name.startswith(prefix + former)]:
                state_dict[prefix + now + name.removeprefix(prefix + former)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def next_sample(self) -> int:
        """How many images training has drawn for."""
        return int(self._drawn)

    @next_sample.setter
    def next_sample(self, count: int) -> None:
        self._drawn.fill_(count)

    @property
    def loss_fn(self) -> Callable[..., Tensor]:
        """PyTorch's loss of loss_type, called as loss_fn(output, target, reduction="none")."""
        return FUNCTIONS[self.loss_type]

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
        diffusion_loops.warn_of_own_steps(self, "save_run")
        config = make_config(self.model, self.schedule, self.prediction, sampling=self.sampling())
        with held(folder):
            free_folder(folder, overwrite)
            start_run(folder, config, self.model)

    # --- a step; t: int64 [n], from 0 -----------------------------------------------------------------------------

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
        x0 = self.model_predictions(x, t, **estimate(x_self_cond)).pred_x_start
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
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
        check_integer("t", t, 0, self.num_timesteps - 1)
        times = torch.full((len(x),), t, device=x.device)
        mean, _, logarithm, x0 = self.p_mean_variance(x, times, clip_denoised=True, **estimate(x_self_cond))
        if t == 0:
            return mean, x0
        draw = PhiloxNoise(seed) if noise is None else noise
        samples = torch.arange(first_sample, first_sample + len(x), device=x.device)
        z = draw(samples, t + 1, Stream.SAMPLING, tuple(x.shape[1:])).to(x)
        return (mean + (0.5 * logarithm).exp() * z).to(x.dtype), x0

    # --- training -------------------------------------------------------------------------------------------------

    def _next(self, n: int, taken: bool) -> Tensor:
        """Indices of the next n images of training, int64 [n], that are counted if they are taken; ranks take turns."""
        if self._present is not None and len(self._present) == n:
            return self._present  # whose loss is being computed
        if getattr(self, "_is_replica", False):  # whose count is thrown away: every step would draw the same
            needs = "samples=, or DistributedDataParallel (torchrun)"
            raise RuntimeError(f"DataParallel: its replicas cannot count the images drawn for, needs {needs}")
        here = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
        first = (self._drawn + rank * n).to(self.device)
        if taken:
            self._drawn.add_(size * n)
        return first + torch.arange(n, device=self.device)

    def _noise(self, like: Tensor, samples: Tensor, stream: int = Stream.TRAINING_NOISE) -> Tensor:
        return philox.normal_like(like, self.seed, samples, stream, like.dtype)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(ab) x0 + sqrt(1 - ab) noise, like x_start; noise None: the next of training's."""
        noise = self._noise(x_start, self._next(len(x_start), taken=True)) if noise is None else noise
        of_noise = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return (self._at("sqrt_alphas_cumprod", t, x_start) * x_start + of_noise * noise).to(x_start.dtype)

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
        samples = self._next(len(x_start), taken=True) if samples is None else samples
        noise = self._noise(x_start, samples) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength:
            noise = noise + strength * self._noise(x_start[:, :, :1, :1], samples, Stream.OFFSET)
        x_t, previous = self.q_sample(x_start, t, noise), None
        if self.self_condition:
            with torch.no_grad():
                previous = for_half(self.model_predictions(x_t, t).pred_x_start, self.seed, samples)
            if torch.is_autocast_enabled(x_start.device.type):
                torch.clear_autocast_cache()  # of weights that were cast without gradients
        output = predict(self.model, x_t, t, None, previous)
        target = {"pred_noise": noise, "pred_x0": x_start}.get(self.objective)
        target = self.predict_v(x_start, t, noise) if target is None else target
        loss = self.loss_fn(output.to(target.dtype), target, reduction="none").flatten(1).mean(dim=1)
        loss = loss * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def random_times(self, batch_size: int) -> Tensor:
        """Timesteps from 0 of the next images of training, int64 [batch_size]. A subclass may draw others."""
        samples = self._next(batch_size, taken=False)
        return philox.training_timesteps(self.seed, samples, self.num_timesteps) - 1

    def forward(
        self,
        img: Tensor,
        *arguments: Any,
        times: Tensor | None = None,
        samples: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of images [n, C, H, W], 0..1 with auto_normalize. times: int64 [n] from 0; None: `random_times`.

        The rest is that of `p_losses`. Raises TypeError or ValueError for what are no such images.
        """
        needs = [self.channels, *self.image_size]
        if not img.is_floating_point():
            raise TypeError(f"img: got {img.dtype}, needs floating point (0..1)")
        if list(img.shape[1:]) != needs:
            raise ValueError(f"img: got shape {list(img.shape)}, needs [n, {', '.join(map(str, needs))}]")
        samples = self._next(len(img), taken=True) if samples is None else samples
        self._present = samples  # for a subclass by the library's signatures, which have no place for them
        try:
            times = self.random_times(len(img)) if times is None else times
            if not self.has_own("p_losses") or diffusion_loops.accepts(self.p_losses, "samples"):
                options["samples"] = samples
            return self.p_losses(self.normalize(img), times, *arguments, **options)
        finally:
            self._present = None

    def has_own(self, name: str) -> bool:
        """Whether a method of this name is a subclass's, or was replaced on the object."""
        return getattr(getattr(self, name), "__func__", None) is not getattr(GaussianDiffusion, name)

    # --- sampling -------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """Images [n, C, H, W], 0..1 with auto_normalize: a `Trajectory` of `table()`.

        Args:
            batch_size: how many, n. return_all_timesteps: [n, S + 1, C, H, W], from pure noise to the images.
            how: x_T [n, C, H, W] to start from; noise(samples, step, stream, shape) -> [n, *shape] instead of the
                contract's; seed (0), first_sample (0), engine ("auto"), dtype (float32): see `Trajectory`.
        """
        check_integer("batch_size", batch_size)
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, *self.image_size), return_all_timesteps=return_all_timesteps, **how)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """Ancestral sampling in T steps, whatever sampling_timesteps is. shape: [n, C, H, W]; the rest as `sample`."""
        table = self.table(ddim=False)
        return self.unnormalize(diffusion_loops.draw(self, table, shape, return_all_timesteps, **how))

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False, **how: Any) -> Tensor:
        """DDIM in sampling_timesteps steps. shape: [n, C, H, W]; the rest as `sample`."""
        table = self.table(ddim=True)
        return self.unnormalize(diffusion_loops.draw(self, table, shape, return_all_timesteps, **how))

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
        table = self.table(ddim=False).from_row(self.num_timesteps - t)
        return diffusion_loops.draw(self, table, x.shape, x_T=x, seed=seed, **how)
