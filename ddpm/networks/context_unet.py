"""ContextUnet, known from 16x16 sprites. Parameter names follow the original, so published state dicts load."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddpm.networks.blocks import EmbedFC, ResidualConvBlock, UnetDown, UnetUp
from ddpm.networks.protocol import ZeroIsNone, check_call, fit_state_dict, network
from ddpm.sizes import short, sides_of
from kernels.philox import is_integer

GROUPS = 8
SIDE_MAX = 1 << 16  # of images, which bounds the levels that a damaged file can ask for
SHORTCUT_PREFIX = "init_conv.shortcut."


@network("context_unet")
class ContextUnet(ZeroIsNone):
    """The context- and time-conditioned U-Net. Raises ValueError for sizes that do not fit.

    Args:
        in_channels: image channels C. n_feat: width of the first level, a multiple of 8.
        n_cfeat: length of the context vector, 0 for an unconditional network.
        height: side of square images, or (height, width); each divisible by 2^depth.
        multipliers: width of each level in units of n_feat; default min(2^i, 8) over as many levels as it takes
            to bring the longer side to at most 8 pixels, or as the sides can be halved, at least two. Its length is
            the depth, at least 2.
    """

    time = "fraction"

    def __init__(
        self,
        in_channels: int,
        n_feat: int = 64,
        n_cfeat: int = 5,
        height: int | Sequence[int] = 16,
        multipliers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not all(is_integer(size) for size in (in_channels, n_feat, n_cfeat, *(multipliers or ()))):
            got = in_channels, n_feat, n_cfeat, multipliers
            raise ValueError(f"in_channels, n_feat, n_cfeat, multipliers: got {got}, needs integers")
        in_channels, n_feat, n_cfeat, sides = int(in_channels), int(n_feat), int(n_cfeat), sides_of(height, "height")
        if max(sides) > SIDE_MAX:
            raise ValueError(f"height: got {height}, needs at most {SIDE_MAX}")
        if multipliers is None:
            halvings = max(2, math.ceil(math.log2(max(1, *sides) / 8)))
            while halvings > 2 and any(side % 2**halvings for side in sides):
                halvings -= 1
            multipliers = [min(2**i, 8) for i in range(halvings)]
        multipliers = tuple(map(int, multipliers))
        self.depth = depth = len(multipliers)
        if depth < 2 or min(multipliers) < 1:
            raise ValueError(f"multipliers: got {multipliers}, needs at least two integers >= 1")
        if in_channels < 1 or n_cfeat < 0:
            raise ValueError(f"in_channels, n_cfeat: got {in_channels}, {n_cfeat}, needs >= 1, >= 0")
        if n_feat < GROUPS or n_feat % GROUPS:
            raise ValueError(f"n_feat: got {n_feat}, needs a multiple of {GROUPS} (the normalisation's groups)")
        step = 2**depth
        below, above = ([max(1, round_(side / step)) * step for side in sides] for round_ in (math.floor, math.ceil))
        if below != list(sides):
            nearest = " or ".join(dict.fromkeys(str(short(each)) for each in (below, above)))
            needs = f"a multiple of {step} for {depth} halvings (--image-size {nearest})"
            raise ValueError(f"height: got {height}, needs {needs}")
        self.in_channels, self.n_feat, self.n_cfeat = in_channels, n_feat, n_cfeat
        self.condition_shape = (n_cfeat,) if n_cfeat else None
        self.height, self.width, self.multipliers = *sides, multipliers
        widths = [n_feat, *(n_feat * multiplier for multiplier in multipliers)]
        deepest, second = widths[-1], widths[-2]
        bottleneck = tuple(side // 2**depth for side in sides)
        self.init_conv = ResidualConvBlock(in_channels, n_feat, is_res=True)
        for level in range(1, depth + 1):
            self.add_module(f"down{level}", UnetDown(widths[level - 1], widths[level]))
        self.to_vec = nn.Sequential(nn.AvgPool2d(bottleneck), nn.GELU())
        self.timeembed1, self.timeembed2 = EmbedFC(1, deepest), EmbedFC(1, second)
        if n_cfeat:
            self.contextembed1, self.contextembed2 = EmbedFC(n_cfeat, deepest), EmbedFC(n_cfeat, second)
        up0 = nn.ConvTranspose2d(deepest, deepest, bottleneck, bottleneck)
        self.up0 = nn.Sequential(up0, nn.GroupNorm(GROUPS, deepest), nn.ReLU())
        for level in range(1, depth + 1):
            self.add_module(f"up{level}", UnetUp(2 * widths[depth + 1 - level], widths[depth - level]))
        merge, last = nn.Conv2d(2 * n_feat, n_feat, 3, padding=1), nn.Conv2d(n_feat, in_channels, 3, padding=1)
        self.out = nn.Sequential(merge, nn.GroupNorm(GROUPS, n_feat), nn.ReLU(), last)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one sample: (C, H, W)."""
        return self.in_channels, self.height, self.width

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        height = self.height if self.height == self.width else [self.height, self.width]
        own = {name: getattr(self, name) for name in ("in_channels", "n_feat", "n_cfeat")}
        return own | {"height": height, "multipliers": list(self.multipliers)}

    @classmethod
    def for_data(
        cls, shape: tuple[int, ...], classes: int, n_feat: int, multipliers: Sequence[int] | None = None
    ) -> "ContextUnet":
        """For images of this shape (C, H, W); without classes unconditional."""
        if len(shape) != 3:
            raise ValueError(f"network: context_unet is for images, the data have {list(shape)}")
        channels, *sides = shape
        return cls(channels, n_feat, classes, sides, multipliers)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x [n, C, H, W], t [n] in (0, 1], c [n, n_cfeat] or None = zeros -> [n, C, H, W]."""
        t = check_call(self, x, t, c)
        skips = [self.init_conv(x)]
        for level in range(1, self.depth + 1):
            skips.append(getattr(self, f"down{level}")(skips[-1]))
        up = self.up0(self.to_vec(skips[-1]))
        for level in range(1, self.depth + 1):
            if level <= 2:
                up = self._gate(level, up, t, c)
            up = getattr(self, f"up{level}")(up, skips[-level])
        return self.out(torch.cat((up, skips[0]), dim=1))

    def _gate(self, level: int, up: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """cemb * up + temb; an unconditional network has no cemb."""
        time = getattr(self, f"timeembed{level}")(t.to(up.dtype))[:, :, None, None]
        if self.n_cfeat == 0:
            return up + time
        context = up.new_zeros(up.shape[0], self.n_cfeat) if c is None else c.to(up.dtype)
        return getattr(self, f"contextembed{level}")(context)[:, :, None, None] * up + time


def load_context_unet_weights(model: ContextUnet, state_dict: Mapping[str, Tensor]) -> None:
    """Load a published ContextUnet state dict, with or without the shortcut.

    The original made its shortcut convolution anew, at random, in every call, so published weights have none: it
    becomes zero, the expectation of that random convolution, with a warning. Counters of batches, which nothing reads,
    may be missing (PyTorch before 0.4.1) or cast with the weights: then they are zero.

    Raises ValueError as `fit_state_dict` does.
    """
    own, given = model.state_dict(), dict(state_dict)
    shortcut = {name: torch.zeros(own[name].shape) for name in own if name.startswith(SHORTCUT_PREFIX)}
    without = bool(shortcut) and not shortcut.keys() & given.keys()
    counters = {name: torch.tensor(0) for name in own if name.endswith(".num_batches_tracked")}
    rounded = {name for name in counters.keys() & given.keys() if given[name].is_floating_point()}
    given = counters | {name: tensor for name, tensor in given.items() if name not in rounded}
    try:
        fit_state_dict(model, shortcut | given if without else given)
    except ValueError as error:
        raise ValueError(f"state dict: {error}") from error
    if without:
        without = "these weights have no init_conv.shortcut (the original made it at random in every call): set to zero"
        warnings.warn(without, stacklevel=2)
