"""Noise as an argument: noise(samples, step, stream, shape) -> [n, *shape], by default the noise contract."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import philox

Noise = Callable[[Tensor, int, int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class PhiloxNoise:
    """The default, on the device of the samples. Engines that know it draw it inside their kernels."""

    seed: int
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        return philox.normal(self.seed, samples, step, stream, shape, device=samples.device, dtype=self.dtype)
