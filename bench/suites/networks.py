"""The network that the suites `step`, `sampling` and `training` share, with random weights, and what it costs."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm import ContextUnet
from ddpm.engines import ENGINES, missing

SEED = 7
CHANNELS, SIDE, N_FEAT, N_CFEAT = 3, 16, 64, 5
TIMESTEPS = 500
# On 50 rows of ddpm at batch 1 (these weights, CPU): 4e-7, 1.7e-3 in bfloat16, 1.8e-4 in float16.
PARITY = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def network(device: torch.device, side: int = SIDE) -> ContextUnet:
    """A ContextUnet for [n, 3, side, side] in eval mode; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ContextUnet(CHANNELS, N_FEAT, N_CFEAT, side).eval().to(device)


@cache
def forward_flops(side: int = SIDE) -> float:
    """Floating-point operations of one image in one call, counted by PyTorch (convolutions and matrix products)."""
    shape = (1, CHANNELS, side, side)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ContextUnet(CHANNELS, N_FEAT, N_CFEAT, side).eval()(torch.empty(shape), torch.empty(1), torch.empty(1, N_CFEAT))
    return float(counter.get_total_flops())


def step_bytes(model: ContextUnet, batch: int, dtype: torch.dtype) -> float:
    """The least a step can move: weights read once, the float32 state read and written."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return weights + 2 * 4 * batch * math.prod(model.sample_shape)


def contexts(batch: int, device: torch.device) -> Tensor:
    """One-hot float32 [batch, 5], the classes in turn."""
    return torch.eye(N_CFEAT, device=device)[torch.arange(batch, device=device) % N_CFEAT]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def distance(actual: Tensor, expected: Tensor) -> float:
    """max|difference| / max(1, max|expected|), in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def engine_error(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """What PARITY[dtype] bounds: the distance in float32, the relative L2 below it."""
    return (distance if dtype == torch.float32 else relative_l2)(actual, expected)


def competitors(device: torch.device) -> list[str]:
    """The engines beside `eager` that this machine can run."""
    return [name for name in ENGINES if name != "eager" and missing(name, device) is None]
