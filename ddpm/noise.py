"""Noise as an argument: noise(samples, step, stream, shape) -> [n, *shape], by default the noise contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import philox

Noise = Callable[[Tensor, int, int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class PhiloxNoise:
    """The default, on the device of the samples. Engines that know it draw it inside their kernels."""

    seed: int | Tensor
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        return philox.normal(self.seed, samples, step, stream, shape, device=samples.device, dtype=self.dtype)

    def of_steps(self, samples: Tensor, steps: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The sampling noise of each of several steps, [n, *shape] each; one draw, as small ones are all overhead."""
        step = torch.tensor(steps, device=samples.device).repeat_interleave(len(samples))
        return self(samples.repeat(len(steps)), step, philox.Stream.SAMPLING, shape).split(len(samples))
