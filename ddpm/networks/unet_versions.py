"""What the Unet of denoising_diffusion_pytorch was from 0.22 (June 2022) on: a table, and parts that are gone."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.errors import check_integer


class Structure(NamedTuple):
    """What differs between releases. The defaults are the present network."""

    groups: bool = False  # GroupNorm in residual blocks, else RMSNorm
    memory: bool = True  # learned keys and values of attention
    nested: bool = False  # attention is named fn.fn, and its first norm fn.norm
    divided: bool = False  # linear attention divides values by the number of pixels
    standardized: bool = False  # the weights of residual blocks' convolutions are standardised
    layer_norm: bool = False  # attention has LayerNorm over channels, else RMSNorm
    strided: bool = False  # what halves the sides is a 4x4 convolution, else all four pixels side by side
    scale: float = 0.0  # full attention normalises q and k, then scales them by this; 0: as usual
    bias: bool = False  # LayerNorm has one


# The first release of each, and what it has otherwise than the next newer one.
CHANGES = (
    ("2.0.0", {}),
    ("1.9.0", {"groups": True}),
    ("1.8.0", {"memory": False}),
    ("1.7.4", {"nested": True}),
    ("1.7.3", {"divided": True}),
    ("1.7.0", {"standardized": True}),
    ("0.32.0", {"layer_norm": True}),
    ("0.28.0", {"strided": True}),
    ("0.27.3", {"scale": 10.0}),
    ("0.26.5", {"scale": 16.0, "standardized": False}),
    ("0.26.4", {"bias": True}),
    ("0.26.0", {"divided": False}),
    ("0.22.0", {"scale": 0.0}),
)
PRESENT, WITH_GROUPS = "2.0.0", "1.9.0"
GROUPS = 8  # of GroupNorm, unless said


def _numbers(version: str) -> tuple[int, ...]:
    """Three, of a version with two or three."""
    return (*map(int, version.split(".")), 0)[:3]


_changed = accumulate((change for _, change in CHANGES), lambda held, change: held | change)
STRUCTURES = {release: Structure(**held) for (release, _), held in zip(CHANGES, _changed, strict=True)}


def release_of(version: str | None, groups: int | None = None) -> str:
    """The first release with the network of this one: a key of STRUCTURES. Raises ValueError for none, or no number.

    None: the present one, or the last with GroupNorm where its groups are given.
    """
    if version is None:
        return PRESENT if groups is None else WITH_GROUPS
    found = re.match(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?(?=[a-z.+]|$)", version) if isinstance(version, str) else None
    if found is None:
        raise ValueError(f"version: got {version!r}, needs that of a release, say '1.5.4'")
    release = next((name for name in STRUCTURES if _numbers(name) <= _numbers(found[0])), None)
    if release is None:
        oldest = CHANGES[-1][0]
        raise ValueError(f"version: got {version!r}, whose network is not built, needs {oldest} or later")
    return release


def groups_of(release: str, asked: int | None, widths: Sequence[int]) -> int:
    """Of GroupNorm in the network of a release; 0 where it has none. Raises ValueError."""
    if not STRUCTURES[release].groups:
        if asked is not None:
            raise ValueError(f"resnet_block_groups: got {asked!r}, which no network has from {PRESENT} on, needs None")
        return 0
    groups = GROUPS if asked is None else asked
    check_integer("resnet_block_groups", groups)
    if any(width % groups for width in widths):
        raise ValueError(f"resnet_block_groups: got {groups}, needs a divisor of all widths, {sorted(set(widths))}")
    return groups


class GroupNorm(nn.GroupNorm):
    """PyTorch's, in the place of RMSNorm."""

    def film(self, scale: Tensor, shift: Tensor) -> Tensor:
        """As of RMSNorm."""
        gain, bias = (each[:, None, None] for each in (self.weight, self.bias))
        return torch.cat((gain * (1 + scale), bias * (1 + scale) + shift), dim=1)

    def normalized(self, x: Tensor) -> Tensor:
        """x without gain and bias."""
        return F.group_norm(x, self.num_groups, eps=self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * g, and + b if there is one, over channels."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        x = (x - mean) * (variance + 1e-5).rsqrt() * self.g
        return x if self.b is None else x + self.b


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 for each output (Qiao et al. 2019)."""

    def standardized(self) -> Tensor:
        """The weights it convolves with, like `weight`."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (variance + 1e-5).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardized(), self.bias, padding=self.padding)


class Nested(nn.Module):
    """Attention and the norm before it by their former names, fn.fn and fn.norm."""

    def __init__(self, norm: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Module()
        self.fn.fn, self.fn.norm = attention, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.fn.fn(self.fn.norm(x))
