"""The network that the suites share, with random weights, and what networks cost."""

import copy
import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm import ContextUnet
from ddpm.metrics import ENGINE_TOLERANCE
from ddpm.networks import condition_shape, network_times, sample_shape
from ddpm.networks.protocol import in_type

SEED = 7
CHANNELS, SIDE, N_FEAT, CLASSES = 3, 16, 64, 5
TIMESTEPS = 500
# What `metrics.engine_error` may be. On 50 rows of ddpm at batch 1 (these weights, CPU): 4e-7, 1.7e-3 in bfloat16,
# 1.8e-4 in float16.
PARITY = {torch.float32: ENGINE_TOLERANCE, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def network(device: torch.device, side: int = SIDE) -> ContextUnet:
    """A ContextUnet for [n, 3, side, side] in eval mode; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ContextUnet(CHANNELS, N_FEAT, CLASSES, side).eval().to(device)


def flops_of(model: nn.Module) -> float:
    """Floating-point operations of one sample in one call, counted by PyTorch (convolutions and matrix products)."""
    t = in_type(network_times(model, torch.ones(1, dtype=torch.int64), 1)).to("meta")
    condition = condition_shape(model)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        context = None if condition is None else torch.empty(1, *condition)
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *sample_shape(model)), t, context)
    return float(counter.get_total_flops())


@cache
def forward_flops(side: int = SIDE) -> float:
    """Those of the shared network."""
    with torch.device("meta"):
        return flops_of(ContextUnet(CHANNELS, N_FEAT, CLASSES, side))


def step_bytes(model: nn.Module, batch: int, dtype: torch.dtype) -> float:
    """The least a step can move: weights read once, the float32 state read and written."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return weights + 2 * 4 * batch * math.prod(sample_shape(model))


def contexts(batch: int, device: torch.device) -> Tensor:
    """One-hot float32 [batch, 5], the classes in turn."""
    return torch.eye(CLASSES, device=device)[torch.arange(batch, device=device) % CLASSES]
