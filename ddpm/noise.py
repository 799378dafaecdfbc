"""Noise as an argument: noise(samples, step, stream, shape) -> [n, *shape], by default the noise contract."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.table import StepTable
from kernels import philox

Noise = Callable[[Tensor, int, int, tuple[int, ...]], Tensor]

# Normals drawn at a time on the CPU, where a step's noise at batch 1 is all overhead: 1.3 ms a step when drawn alone,
# next to 5 ms for the network.
NOISE_BATCH_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class PhiloxNoise:
    """The default, on the device of the samples. Engines that know it draw it inside their kernels."""

    seed: int | Tensor
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        return philox.normal(self.seed, samples, step, stream, shape, device=samples.device, dtype=self.dtype)


class RowNoise:
    """The sampling noise of a table's noisy rows by row number; Philox for several rows at once, the same noise."""

    def __init__(self, noise: Noise, samples: Tensor, table: StepTable, shape: tuple[int, ...]) -> None:
        self.noise, self.samples, self.shape = noise, samples, shape
        self.steps = table.noise_steps.tolist()
        self.noisy = [i for i, noisy in enumerate(table.noisy) if noisy]
        self.at_once = max(1, NOISE_BATCH_ELEMENTS // max(1, len(samples) * math.prod(shape)))
        self.drawn: dict[int, Tensor] = {}

    def __call__(self, row: int) -> Tensor:
        """[n, *shape]."""
        if not isinstance(self.noise, PhiloxNoise):
            return self.noise(self.samples, self.steps[row], philox.Stream.SAMPLING, self.shape)
        if row not in self.drawn:
            first = self.noisy.index(row)
            rows = self.noisy[first : first + self.at_once]
            n, steps = len(self.samples), torch.tensor([self.steps[r] for r in rows], device=self.samples.device)
            samples, steps = self.samples.repeat(len(rows)), steps.repeat_interleave(n)
            draws = self.noise(samples, steps, philox.Stream.SAMPLING, self.shape)
            self.drawn = dict(zip(rows, draws.split(n), strict=True))
        return self.drawn[row]
