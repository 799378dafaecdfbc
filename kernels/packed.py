"""Weights of a convolution as its C++ reads them fastest (`native/convolution.cpp`), and by which sum it is made.

WINOGRAD   3x3 of channels in multiples of 32      [C' / 32, 36, C, 32], see `winograd.transform`
FEW        up to 4 outputs, vectors along inputs   [C', k k, C filled up to a multiple of 16]
SUMS       all others, vectors along outputs       [C' / 32 filled up, k k, C, 32]

F(2x2, 3x3) has less than half of the weights of F(4x4, 3x3), but takes 1.2 to 1.8 times as long for 64, 128 and 256
channels, 16x16, 8x8 and 4x4 pixels and batches of 1 to 128; except for a single tile, one image of 4x4, where it takes
0.5 to 0.7 of the time (two cores of an EPYC with AVX-512, Zen 4). So there is none.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.winograd import PANEL, SIDE, fits, transform

SUMS, WINOGRAD, FEW = range(3)  # as native/convolution.h numbers them
NARROW, FILLED = 4, 16  # of FEW: outputs at most; inputs at least, to a multiple of which they are filled up


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights float32 [C', C, k, k], their `shape`, packed by `pack` into `tensor`."""

    tensor: Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        """Of the weights."""
        return len(self.shape)

    @property
    def kind(self) -> int:
        """By which sum."""
        if self.tensor.ndim == 3:
            return FEW
        return WINOGRAD if self.tensor.shape[1] == SIDE**2 else SUMS


def kind_of(*weights: Tensor, spread: bool = False) -> int:
    """By which sum a convolution of sources with these weights [C', C, k, k] is made; `spread`: then spread."""
    if all(map(fits, weights)) and not spread:
        return WINOGRAD
    few = weights[0].shape[0] <= NARROW and min(weight.shape[1] for weight in weights) >= FILLED
    return FEW if few else SUMS


def pack(weight: Tensor, kind: int) -> Packed:
    """The weights [C', C, k, k] of one source for this sum; Winograd's from float64."""
    shape = tuple(weight.shape)
    if kind == WINOGRAD:
        return Packed(transform(weight), shape)
    columns, channels, _, _ = shape
    taps = weight.float().flatten(2).permute(0, 2, 1)  # [C', k k, C]
    if kind == FEW:
        return Packed(F.pad(taps, (0, -channels % FILLED)).contiguous(), shape)
    panels = F.pad(taps, (0, 0, 0, 0, 0, -columns % PANEL)).unflatten(0, (-1, PANEL))
    return Packed(panels.permute(0, 2, 3, 1).contiguous(), shape)
