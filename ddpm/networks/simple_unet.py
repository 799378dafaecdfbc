"""SimpleUNet: the small U-Net of the tutorials, told the time by sines and cosines; its skips fit, at every side.

    block(x) = GELU(BN(conv(GELU(BN(conv(x))) + s)))        s = W e(t), from the bottom up + V c

A level of the way down is a block and a 2x2 max-pool; one of the way up is a 2x2 transposed convolution over x and what
that level left, and a block. Images are padded with zeros to sides that can be halved so often, the output is cropped.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.errors import check_integer
from ddpm.networks.blocks import ResidualConvBlock, Sinusoidal
from ddpm.networks.protocol import ZeroIsNone, check_call, network
from ddpm.sizes import sides_of

GROUPS = 8
SIDE_MAX = 1 << 16
LEVELS_MAX = 8  # at 8 one pixel becomes 256x256
MULTIPLIERS, TIME_DIM = (1, 2, 4), 64
THETA = 10000  # longest period of the time's embedding, in units of 2 pi


class ShiftedBlock(ResidualConvBlock):
    """Two [3x3 convolution, BatchNorm, GELU] with a shift of each channel between them."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [n, in, h, w], shift [n, out] -> [n, out, h, w]."""
        return self.conv2(self.conv1(x) + shift[:, :, None, None])


class Padding(nn.Module):
    """Zeros around images up to sides that are multiples of `step`, the odd row or column at the bottom or right."""

    def __init__(self, sides: Sequence[int], step: int) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.before, self.after = (tuple((-side % step + odd) // 2 for side in sides) for odd in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W], padded."""
        (top, left), (bottom, right) = self.before, self.after
        return F.pad(x, (left, right, top, bottom)) if bottom or right else x

    def cropped(self, x: Tensor) -> Tensor:
        """What lies within."""
        (top, left), (height, width) = self.before, self.sides
        return x[..., top : top + height, left : left + width]


class Shifts(nn.Module):
    """What the blocks add: of the time each of them, of the condition the last ones. widths: of all blocks."""

    def __init__(self, widths: Sequence[int], conditioned: int, time_dim: int, n_cfeat: int) -> None:
        super().__init__()
        self.widths, self.conditioned = tuple(widths), tuple(widths[-conditioned:])
        layers = nn.Linear(time_dim, time_dim), nn.GELU(), nn.Linear(time_dim, sum(self.widths))
        self.time = nn.Sequential(Sinusoidal(time_dim, THETA), *layers)
        # Without a bias: a condition of zeros is none.
        self.context = nn.Linear(n_cfeat, sum(self.conditioned), bias=False) if n_cfeat else None

    def of_time(self, t: Tensor) -> tuple[Tensor, ...]:
        """t [n] -> [n, C] for each block."""
        angles, *layers = self.time
        embedding = angles(t).to(layers[0].weight.dtype)
        for layer in layers:
            embedding = layer(embedding)
        return embedding.split(self.widths, dim=-1)

    def of_context(self, c: Tensor) -> tuple[Tensor, ...]:
        """c [..., n_cfeat] -> [..., C] for each of the last blocks."""
        return self.context(c.to(self.context.weight.dtype)).split(self.conditioned, dim=-1)


@network("simple_unet")
class SimpleUNet(ZeroIsNone):
    """forward(x [n, C, H, W], t [n] from 0, c [n, n_cfeat] or None = zeros) -> [n, C, H, W]. Raises ValueError.

    Args:
        in_channels: image channels C. n_feat: width outside, a multiple of 8.
        n_cfeat: length of the condition, 0 for an unconditional network.
        height: side of square images, or (height, width): any.
        multipliers: width of each level in units of n_feat, as many levels as halvings, at most 8.
        time_dim: of the time's embedding, even, at least 4.
    """

    time = "index"

    def __init__(
        self,
        in_channels: int,
        n_feat: int = 64,
        n_cfeat: int = 0,
        height: int | Sequence[int] = 28,
        multipliers: Sequence[int] = MULTIPLIERS,
        time_dim: int = TIME_DIM,
    ) -> None:
        super().__init__()
        sides = sides_of(height, "height", low=0)
        if not isinstance(multipliers, list | tuple) or not 1 <= len(multipliers) <= LEVELS_MAX:
            raise ValueError(f"multipliers: got {str(multipliers)[:80]}, needs 1..{LEVELS_MAX} integers, one a level")
        check_integer("in_channels", in_channels)
        check_integer("n_cfeat", n_cfeat, 0)
        for name, values, high in (("height", sides, SIDE_MAX), ("multipliers", multipliers, None)):
            for value in values:
                check_integer(name, value, 1, high)
        for name, value, step in (("n_feat", n_feat, GROUPS), ("time_dim", time_dim, 2)):
            check_integer(name, value, max(step, 4))
            if value % step:
                raise ValueError(f"{name}: got {value}, needs a multiple of {step}")
        self.sample_shape = (in_channels, *sides)
        self.condition_shape = (n_cfeat,) if n_cfeat else None
        self.n_feat, self.n_cfeat, self.multipliers, self.time_dim = n_feat, n_cfeat, tuple(multipliers), time_dim
        depth = len(multipliers)
        self.padding = Padding(sides, 2**depth)
        widths = [n_feat, *(n_feat * multiplier for multiplier in multipliers)]
        outer, deepest = widths[-2::-1], widths[-1]
        self.shifts = Shifts([*widths[1:], deepest, *outer], depth + 1, time_dim, n_cfeat)
        self.conv0 = nn.Conv2d(in_channels, n_feat, 3, padding=1)
        self.downs = nn.ModuleList(ShiftedBlock(wide, deeper) for wide, deeper in pairwise(widths))
        self.middle = ShiftedBlock(deepest, deepest)
        self.transforms = nn.ModuleList(
            nn.ConvTranspose2d(2 * deeper, wide, 2, 2) for deeper, wide in pairwise([deepest, *outer])
        )
        self.ups = nn.ModuleList(ShiftedBlock(wide, wide) for wide in outer)
        merge, last = nn.Conv2d(2 * n_feat, n_feat, 3, padding=1), nn.Conv2d(n_feat, in_channels, 3, padding=1)
        self.out = nn.Sequential(merge, nn.GroupNorm(GROUPS, n_feat), nn.ReLU(), last)

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        channels, height, width = self.sample_shape
        own = {"in_channels": channels, "n_feat": self.n_feat, "n_cfeat": self.n_cfeat, "time_dim": self.time_dim}
        return own | {"height": height if height == width else [height, width], "multipliers": list(self.multipliers)}

    @classmethod
    def for_data(
        cls,
        shape: tuple[int, ...],
        classes: int,
        n_feat: int,
        multipliers: Sequence[int] = MULTIPLIERS,
        time_dim: int = TIME_DIM,
    ) -> "SimpleUNet":
        """For images of this shape (C, H, W); without classes unconditional."""
        if len(shape) != 3:
            raise ValueError(f"network: simple_unet is for images, the data have {list(shape)}")
        return cls(shape[0], n_feat, classes, shape[1:], multipliers, time_dim)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x [n, C, H, W], t [n] counted from 0, whole or not, c [n, n_cfeat] or None = zeros -> [n, C, H, W]."""
        t = check_call(self, x, t, c)
        shifts = list(self.shifts.of_time(t))
        if c is not None and self.n_cfeat:
            of_context = self.shifts.of_context(c)
            shifts[-len(of_context) :] = map(torch.add, shifts[-len(of_context) :], of_context)
        shift = iter(shifts)
        skips = [self.conv0(self.padding(x))]
        for block in self.downs:
            skips.append(F.max_pool2d(block(skips[-1], next(shift)), 2))
        x = self.middle(skips[-1], next(shift))
        for transform, block in zip(self.transforms, self.ups, strict=True):
            x = block(transform(torch.cat((x, skips.pop()), dim=1)), next(shift))
        return self.padding.cropped(self.out(torch.cat((x, skips.pop()), dim=1)))
