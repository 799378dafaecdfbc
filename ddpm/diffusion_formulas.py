"""Between x_t, x0, noise and v, as GaussianDiffusion computes them: from buffers by name, t int64 [n] from 0."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm.networks.protocol import broadcast
from kernels import backend


class ModelPrediction(NamedTuple):
    """What a network's output says of the noise and of x0, each [n, C, H, W]."""

    pred_noise: Tensor
    pred_x_start: Tensor


class Formulas(nn.Module):
    """The conversions of a diffusion. Its buffers are float32 or wider, and so is what they are multiplied in.

    A subclass registers `ddpm.beta_schedules.buffers_of`, and has num_timesteps and auto_normalize.
    """

    num_timesteps: int
    auto_normalize: bool

    def _apply(self, *arguments: object, **options: object) -> nn.Module:
        """Of `to`, `half`, `bfloat16` and others: tables are not rounded to what a network computes in."""
        before = dict(self._buffers)
        super()._apply(*arguments, **options)
        for name, table in before.items():
            held = self._buffers[name]
            if held.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = table.to(held.device)
        return self

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
        if not torch.compiler.is_compiling():  # where reading values would break the graph
            backend.check_range("t", t, 0, self.num_timesteps - 1)
        return broadcast(getattr(self, name)[t], like)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 of x_t and noise."""
        of_noise = self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - of_noise * noise).to(x_t.dtype)

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Noise of x_t and x0."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return ((scaled - x0) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)).to(x_t.dtype)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v (Salimans & Ho 2022) of x0 and noise."""
        of_noise = self._at("sqrt_alphas_cumprod", t, x_start)
        return (of_noise * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start).to(x_start.dtype)

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 of x_t and v."""
        of_v = self._at("sqrt_one_minus_alphas_cumprod", t, x_t)
        return (self._at("sqrt_alphas_cumprod", t, x_t) * x_t - of_v * v).to(x_t.dtype)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of q(x_{t-1} | x_t, x0): mean [n, C, H, W], variance and its logarithm [n, 1, 1, 1]."""
        of_x0, of_x = (self._at(f"posterior_mean_coef{k}", t, x_t) for k in (1, 2))
        variance, logarithm = (self._at(f"posterior_{k}", t, x_t) for k in ("variance", "log_variance_clipped"))
        return (of_x0 * x_start + of_x * x_t).to(x_t.dtype), variance, logarithm
