"""How far two results are apart: what benchmarks, exports and tests compare with. A NaN never passes.

Every function takes tensors or arrays, computes in float64 and returns a float that is infinite where a comparison
makes no sense: another shape, or a value that is not finite on either side.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Values = Tensor | np.ndarray
# Between engines in float32 over a whole trajectory, between splits, batches and thread counts, of one network call.
ENGINE_TOLERANCE, SPLIT_TOLERANCE, CALL_TOLERANCE = 1e-4, 1e-5, 1e-5
PEAK = 2.0  # of images in [-1, 1]


def _pair(actual: Values, expected: Values) -> tuple[Tensor, Tensor] | None:
    """Both as float64, on the device that they share or else the CPU; None where they cannot be compared."""
    if tuple(actual.shape) != tuple(expected.shape):
        return None
    first, second = (torch.as_tensor(value).detach() for value in (actual, expected))
    device = first.device if first.device == second.device else "cpu"
    first, second = (value.to(device, torch.float64) for value in (first, second))
    return (first, second) if bool(first.isfinite().all() and second.isfinite().all()) else None


def distance(actual: Values, expected: Values) -> float:
    """max|difference| / max(1, max|expected|), the design's parity."""
    pair = _pair(actual, expected)
    if pair is None:
        return math.inf
    first, second = pair
    return float((first - second).abs().max() / second.abs().max().clamp(min=1)) if first.numel() else 0.0


def elementwise(actual: Values, expected: Values) -> float:
    """max(|difference| / max(1, |expected|)), of operators, whose elements do not influence each other."""
    pair = _pair(actual, expected)
    if pair is None:
        return math.inf
    first, second = pair
    return float(((first - second).abs() / second.abs().clamp(min=1)).max()) if first.numel() else 0.0


def relative_l2(actual: Values, expected: Values) -> float:
    """|difference| / |expected|; of equal zeros 0."""
    pair = _pair(actual, expected)
    if pair is None:
        return math.inf
    difference, norm = float((pair[0] - pair[1]).norm()), float(pair[1].norm())
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def psnr(actual: Values, expected: Values) -> float:
    """Peak signal to noise in dB of images clamped to [-1, 1]: infinite where they are equal, -infinite for NaN."""
    pair = _pair(actual, expected)
    if pair is None:
        return -math.inf
    first, second = (value.clamp(-1, 1) for value in pair)
    error = float((first - second).square().mean())
    return 10 * math.log10(PEAK**2 / error) if error > 0 else math.inf


def worst(errors: Iterable[float]) -> float:
    """The largest error; infinite for NaN, which Python's max may lose."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def engine_error(actual: Values, expected: Values, dtype: torch.dtype) -> float:
    """Of an engine that computes in this type: the distance down to float32, the relative L2 below it."""
    return (distance if dtype in (torch.float32, torch.float64) else relative_l2)(actual, expected)
