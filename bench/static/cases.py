"""The launches that the static report watches: every operator, in the types and memory layouts that it is used with."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from bench.kernels import operator_file
from kernels.backend import WARP, Cost, Launch, recording

F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
LAST = torch.channels_last
N = 64
IMAGE, RAGGED = (N, 3, 16, 16), (N, 1, 5, 7)  # 35 elements: no whole number of vectors
ONE, ROWS = torch.zeros((), dtype=torch.int64), torch.zeros(N, dtype=torch.int64)


@dataclass(frozen=True)
class Case:
    """A launch worth watching: the operator's name, what makes the arguments of its `launch`, those of its `cost`.

    elements: of the output, for kernels that draw no noise and are not launched over items.
    """

    operator: str
    arguments: Callable[[], tuple]
    costs: tuple
    stored: torch.dtype
    elements: int | None = None

    @property
    def cost(self) -> Cost:
        """Of an element."""
        return operator_file(self.operator).cost(*self.costs)

    def launch(self) -> Launch:
        """The launch, recorded and not executed."""
        with recording() as launches:
            operator_file(self.operator).launch(*self.arguments())
        (launch,) = launches
        return launch

    def elements_per_thread(self) -> float:
        """Elements that a program deals with, per thread."""
        launch = self.launch()
        threads = launch.options["num_warps"] * WARP
        if self.elements is not None:
            return self.elements / (prod(launch.grid) * threads)
        return prod(launch.constants[name] for name in ("BLOCK", "REPEAT", "RUN")) / threads


def _images(dtype: torch.dtype, shape: tuple[int, ...] = IMAGE, layout: Any = torch.contiguous_format) -> Tensor:
    return torch.zeros(shape, dtype=dtype).to(memory_format=layout)


# In the next four, where: shape and memory layout of the images, default IMAGE and contiguous.
def _q_sample(x0: torch.dtype, out: torch.dtype, *where: Any) -> Case:
    more = (torch.ones(501), ONE, ROWS, out)
    return Case("q_sample", lambda: (_images(x0, *where), ROWS, *more), (x0, out), out)


def _q_sample_rows(data: torch.dtype, out: torch.dtype, *where: Any, flip: bool = False, noise: bool = False) -> Case:
    more = (torch.ones(501), ONE, ROWS, flip, noise, out)
    return Case("q_sample_rows", lambda: (_images(data, *where), ROWS, *more), (data, out, noise), out)


def _noise_mse(pred: torch.dtype, *where: Any, weighted: bool = False, backward: bool = False) -> Case:
    more = (ONE, ROWS, torch.ones(N) if weighted else None, torch.zeros(()) if backward else None)
    return Case("noise_mse", lambda: (_images(pred, *where), *more), (pred, backward), pred)


def _solver_step(x: torch.dtype, m: torch.dtype, *where: Any, full: bool = False) -> Case:
    """full: guidance, memory of x0 and clip."""

    def arguments() -> tuple:
        image, output = _images(x, *where), _images(m, *where)
        uncond, previous, clip = (output, image, 1.0) if full else (None, None, None)
        return image, output, torch.zeros(50, 8), ONE, ONE, ROWS, uncond, torch.zeros(()), previous, clip

    return Case("solver_step", arguments, (x, m, full, full), x)


def _guidance_rescale(m: torch.dtype, side: int = 16) -> Case:
    """A weight for each sample."""

    def arguments() -> tuple:
        return _images(m, (N, 3, side, side)), _images(m, (N, 3, side, side)), torch.ones(N), torch.zeros(())

    return Case("guidance_rescale", arguments, (m,), F32, N * 3 * side**2)


def _group_norm_relu(x: torch.dtype, side: int = 16) -> Case:
    """The out head of a network with n_feat 64."""
    more = (torch.ones(64, dtype=x), torch.ones(64, dtype=x), 8, 1e-5)
    return Case("group_norm_relu", lambda: (_images(x, (N, 64, side, side), LAST), *more), (x,), x, N * 64 * side**2)


def _bottleneck(x: torch.dtype, side: int = 4) -> Case:
    """Of a network with n_feat 64 on images of four times this side; each image has its context, all share the time."""

    def arguments() -> tuple:
        vector, scale, shift = (torch.ones(shape, dtype=x) for shape in (128, (N, 128), (1, 128)))
        image, weight = _images(x, (N, 128, side, side), LAST), _images(x, (128, 128, side, side), LAST)
        return image, weight, vector, vector, vector, scale, shift, 8, 1e-5

    return Case("bottleneck", arguments, (x, 128, N), x, N * 128 * side * side)


def _convolution(n: int, channels: int, columns: int, side: int, *, skip: int = 0, then: str = "keep") -> Case:
    """bf16, as in a network with n_feat 64: 3x3 with GELU; over two sources without it; 1x1 where it spreads."""
    size, gelu = 1 if then == "spread" else 3, skip == 0 and columns >= 16

    def source(inputs: int) -> tuple[Tensor, Tensor]:
        return _images(BF16, (n, inputs, side, side), LAST), _images(BF16, (columns, inputs, size, size), LAST)

    def arguments() -> tuple:
        second, bias = source(skip) if skip else (None, None), torch.ones(columns, dtype=BF16)
        return *source(channels), bias, *second, None, None, None, gelu, then

    costs = (BF16, channels + skip, columns, size * size, then)
    return Case("convolution", arguments, costs, BF16, n * columns * side * side)


# Named "operator variant"; images are 64 of 3x16x16.
CASES: dict[str, Case] = {}
for label, dtype in {"fp32": F32, "bf16": BF16, "fp16": F16}.items():
    CASES[f"q_sample {label}"] = _q_sample(dtype, dtype)
    CASES[f"noise_mse {label}"] = _noise_mse(dtype)
    CASES[f"noise_mse {label} backward"] = _noise_mse(dtype, backward=True)
    CASES[f"solver_step {label}"] = _solver_step(dtype, dtype)
for label, dtype in {"fp32": F32, "bf16": BF16}.items():
    CASES[f"q_sample uint8 to {label}"] = _q_sample(U8, dtype)
    CASES[f"q_sample_rows uint8 to {label}"] = _q_sample_rows(U8, dtype)
    CASES[f"guidance_rescale {label}"] = _guidance_rescale(dtype)
    CASES[f"group_norm_relu {label}"] = _group_norm_relu(dtype)
    CASES[f"bottleneck {label}"] = _bottleneck(dtype)
for label, where in {"ragged": (RAGGED,), "channels_last": (IMAGE, LAST)}.items():
    CASES[f"q_sample fp32 {label}"] = _q_sample(F32, F32, *where)
    CASES[f"noise_mse fp32 {label}"] = _noise_mse(F32, *where)
    CASES[f"solver_step fp32 {label}"] = _solver_step(F32, F32, *where)
CASES |= {
    "q_sample fp32 28x28": _q_sample(F32, F32, (64, 1, 28, 28)),
    "q_sample bf16 channels_last": _q_sample(BF16, BF16, IMAGE, LAST),
    "q_sample fp32 8 channels_last": _q_sample(F32, F32, (64, 8, 16, 16), LAST),
    "q_sample_rows uint8, flip, noise": _q_sample_rows(U8, F32, flip=True, noise=True),
    "q_sample_rows uint8 ragged": _q_sample_rows(U8, F32, RAGGED),
    "noise_mse fp32 weighted": _noise_mse(F32, weighted=True),
    "noise_mse fp32 weighted backward": _noise_mse(F32, weighted=True, backward=True),
    "noise_mse channels_last backward": _noise_mse(F32, IMAGE, LAST, backward=True),
    "solver_step fp32 full": _solver_step(F32, F32, full=True),
    "solver_step fp32, m bf16": _solver_step(F32, BF16),
    "guidance_rescale fp32 64x64": _guidance_rescale(F32, 64),
    "group_norm_relu bf16 64x64": _group_norm_relu(BF16, 64),
    "bottleneck bf16 28x28": _bottleneck(BF16, 7),
    "convolution bf16": _convolution(64, 64, 64, 16),
    "convolution bf16 one image": _convolution(1, 64, 64, 16),
    "convolution bf16 first": _convolution(64, 3, 64, 16),
    "convolution bf16 last": _convolution(64, 64, 3, 16),
    "convolution bf16 pool": _convolution(64, 128, 128, 8, then="pool"),
    "convolution bf16 two sources": _convolution(64, 64, 64, 16, skip=64),
    "convolution bf16 spread": _convolution(64, 128, 256, 4, skip=128, then="spread"),
}
CASES = {name: CASES[name] for name in sorted(CASES, key=lambda name: name.split()[0])}  # an operator's together
