"""How far two results are apart: what benchmarks, exports and tests compare with. A NaN never passes.

Tensors or arrays, in float64; infinite where there is no comparison: other shapes, values that are not finite.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Values = Tensor | np.ndarray
# Between engines in float32 over a whole trajectory, between splits, batches and thread counts, of one network call.
ENGINE_TOLERANCE, SPLIT_TOLERANCE, CALL_TOLERANCE = 1e-4, 1e-5, 1e-5
PIXEL_RANGE = 2.0  # of images in [-1, 1]

Measure = Callable[[Tensor, Tensor], Tensor | float]


def _compared(
    actual: Values, expected: Values, measure: Measure, otherwise: float = math.inf, empty: float = 0.0
) -> float:
    """The measure of both in float64, on the device that they share or else the CPU; `otherwise` where it has none."""
    if tuple(actual.shape) != tuple(expected.shape):
        return otherwise
    first, second = (torch.as_tensor(value).detach() for value in (actual, expected))
    device = first.device if first.device == second.device else "cpu"
    first, second = (value.to(device, torch.float64) for value in (first, second))
    if not bool(first.isfinite().all() and second.isfinite().all()):
        return otherwise
    return float(measure(first, second)) if first.numel() else empty


def distance(actual: Values, expected: Values) -> float:
    """max|difference| / max(1, max|expected|), the design's parity."""
    return _compared(actual, expected, lambda a, b: (a - b).abs().max() / b.abs().max().clamp(min=1))


def elementwise(actual: Values, expected: Values) -> float:
    """max(|difference| / max(1, |expected|)), of operators, whose elements do not influence each other."""
    return _compared(actual, expected, lambda a, b: ((a - b).abs() / b.abs().clamp(min=1)).max())


def relative_l2(actual: Values, expected: Values) -> float:
    """|difference| / |expected|; of equal zeros 0."""
    return _compared(actual, expected, lambda a, b: 0.0 if torch.equal(a, b) else (a - b).norm() / b.norm())


def psnr(actual: Values, expected: Values) -> float:
    """Peak signal to noise in dB of images clamped to [-1, 1]: infinite where they are equal, -infinite for NaN."""

    def decibels(a: Tensor, b: Tensor) -> Tensor:
        return 10 * torch.log10(PIXEL_RANGE**2 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean())

    return _compared(actual, expected, decibels, otherwise=-math.inf, empty=math.inf)


def worst(errors: Iterable[float]) -> float:
    """The largest error; infinite for NaN, which Python's max may lose."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def engine_error(actual: Values, expected: Values, dtype: torch.dtype) -> float:
    """Of an engine that computes in this type: the distance down to float32, the relative L2 below it."""
    return (distance if dtype in (torch.float32, torch.float64) else relative_l2)(actual, expected)
