"""The networks: `ContextUnet` for images and `PointMLP` for points, both forward(x, t, c).

The ContextUnet is the context- and time-conditioned U-Net known from 16x16 sprites, by the rule that scales it
to any side that halves evenly. Parameter names follow the original, so published state dicts load.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kernels.philox import is_integer

GROUPS = 8
SHORTCUT_PREFIX = "init_conv.shortcut."


def _conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.GELU())


class ResidualConvBlock(nn.Module):
    """Two [3x3 convolution, BatchNorm, GELU]; with is_res the sum with a shortcut, divided by 1.414."""

    def __init__(self, in_channels: int, out_channels: int, is_res: bool = False) -> None:
        super().__init__()
        self.conv1 = _conv_block(in_channels, out_channels)
        self.conv2 = _conv_block(out_channels, out_channels)
        self.is_res = is_res
        if is_res:
            same = in_channels == out_channels
            self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        return (self.shortcut(x) + out) / 1.414 if self.is_res else out


class UnetDown(nn.Module):
    """Two blocks, then a 2x2 max-pool: [n, in, h, w] -> [n, out, h/2, w/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            ResidualConvBlock(in_channels, out_channels),
            ResidualConvBlock(out_channels, out_channels),
            nn.MaxPool2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UnetUp(nn.Module):
    """Concatenation with the skip, a 2x2 transposed convolution, two blocks: [n, in, h, w] -> [n, out, 2h, 2w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, 2, 2),
            ResidualConvBlock(out_channels, out_channels),
            ResidualConvBlock(out_channels, out_channels),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.model(torch.cat((x, skip), dim=1))


class EmbedFC(nn.Module):
    """Linear, GELU, Linear: [n, input_dim] (any shape with that many elements per row) -> [n, emb_dim]."""

    def __init__(self, input_dim: int, emb_dim: int) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.model = nn.Sequential(nn.Linear(input_dim, emb_dim), nn.GELU(), nn.Linear(emb_dim, emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.reshape(-1, self.input_dim))


def _halvings(height: int) -> int:
    """Halvings until the side is at most 8 pixels, at least two."""
    depth = 0
    while height / 2**depth > 8:
        depth += 1
    return max(2, depth)


def _check_condition(x: Tensor, t: Tensor, c: Tensor | None, n_cfeat: int) -> None:
    n = x.shape[0]
    if t.numel() != n:
        raise ValueError(f"t: got shape {list(t.shape)}, needs [{n}], one time per row of x")
    if c is not None and c.shape != (n, n_cfeat):
        raise ValueError(f"c: got shape {list(c.shape)}, needs [{n}, {n_cfeat}]")


class ContextUnet(nn.Module):
    """The context- and time-conditioned U-Net.

    Args:
        in_channels: image channels C.
        n_feat: width of the first level, a multiple of 8.
        n_cfeat: length of the context vector, 0 for an unconditional network.
        height: side of the square images, divisible by 2^depth.
        multipliers: width of each level in units of n_feat; default min(2^i, 8) over as many levels as it takes
            to bring the side to at most 8 pixels, at least two. Its length is the depth, at least 2.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        n_feat: int = 64,
        n_cfeat: int = 5,
        height: int = 16,
        multipliers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not all(is_integer(size) for size in (in_channels, n_feat, n_cfeat, height, *(multipliers or ()))):
            got = in_channels, n_feat, n_cfeat, height, multipliers
            raise ValueError(f"in_channels, n_feat, n_cfeat, height, multipliers: got {got}, needs integers")
        in_channels, n_feat, n_cfeat, height = int(in_channels), int(n_feat), int(n_cfeat), int(height)
        if multipliers is None:
            multipliers = [min(2**i, 8) for i in range(_halvings(height))]
        multipliers = tuple(map(int, multipliers))
        depth = len(multipliers)
        if depth < 2 or min(multipliers) < 1:
            raise ValueError(f"multipliers: got {multipliers}, needs at least two integers >= 1")
        if in_channels < 1 or n_cfeat < 0:
            raise ValueError(f"in_channels, n_cfeat: got {in_channels}, {n_cfeat}, needs >= 1, >= 0")
        if n_feat < GROUPS or n_feat % GROUPS:
            raise ValueError(f"n_feat: got {n_feat}, needs a multiple of {GROUPS} (the normalisation's groups)")
        if height < 2**depth or height % 2**depth:
            raise ValueError(f"height: got {height}, needs a multiple of {2**depth} for {depth} halvings")
        self.in_channels, self.n_feat, self.n_cfeat, self.height = in_channels, n_feat, n_cfeat, height
        self.multipliers = multipliers

        widths = [n_feat, *(n_feat * multiplier for multiplier in multipliers)]
        deepest, second = widths[-1], widths[-2]
        bottleneck = height // 2**depth
        self.depth = depth
        self.init_conv = ResidualConvBlock(in_channels, n_feat, is_res=True)
        for level in range(1, depth + 1):
            self.add_module(f"down{level}", UnetDown(widths[level - 1], widths[level]))
        self.to_vec = nn.Sequential(nn.AvgPool2d(bottleneck), nn.GELU())
        self.timeembed1 = EmbedFC(1, deepest)
        self.timeembed2 = EmbedFC(1, second)
        if n_cfeat:
            self.contextembed1 = EmbedFC(n_cfeat, deepest)
            self.contextembed2 = EmbedFC(n_cfeat, second)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(deepest, deepest, bottleneck, bottleneck),
            nn.GroupNorm(GROUPS, deepest),
            nn.ReLU(),
        )
        for level in range(1, depth + 1):
            self.add_module(f"up{level}", UnetUp(2 * widths[depth + 1 - level], widths[depth - level]))
        self.out = nn.Sequential(
            nn.Conv2d(2 * n_feat, n_feat, 3, padding=1),
            nn.GroupNorm(GROUPS, n_feat),
            nn.ReLU(),
            nn.Conv2d(n_feat, in_channels, 3, padding=1),
        )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one sample: (C, H, W)."""
        return self.in_channels, self.height, self.height

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        return {
            "kind": "context_unet",
            "in_channels": self.in_channels,
            "n_feat": self.n_feat,
            "n_cfeat": self.n_cfeat,
            "height": self.height,
            "multipliers": list(self.multipliers),
        }

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x [n, C, H, W], t [n] in (0, 1], c [n, n_cfeat] or None = zeros -> [n, C, H, W]."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(f"x: got shape {list(x.shape)}, needs [n, {', '.join(map(str, self.sample_shape))}]")
        _check_condition(x, t, c, self.n_cfeat)
        features = self.init_conv(x)
        skips = [features]
        for level in range(1, self.depth + 1):
            skips.append(getattr(self, f"down{level}")(skips[-1]))

        up = self.up0(self.to_vec(skips[-1]))
        for level in range(1, self.depth + 1):
            if level <= 2:
                up = self._gate(level, up, t, c)
            up = getattr(self, f"up{level}")(up, skips[-level])
        return self.out(torch.cat((up, features), dim=1))

    def _gate(self, level: int, up: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """cemb * up + temb; an unconditional network has no cemb."""
        time = getattr(self, f"timeembed{level}")(t.to(up.dtype))[:, :, None, None]
        if self.n_cfeat == 0:
            return up + time
        context = up.new_zeros(up.shape[0], self.n_cfeat) if c is None else c.to(up.dtype)
        return getattr(self, f"contextembed{level}")(context)[:, :, None, None] * up + time


class PointMLP(nn.Module):
    """A small residual MLP for points: forward(x [n, features], t [n], c [n, n_cfeat] or None) -> [n, features].

    t enters as sines and cosines of 2^k pi t, k = 0..7 (Mildenhall et al. 2020, equation 4), added in each block.
    """

    BLOCKS = 3
    FREQUENCIES = 8

    def __init__(self, features: int = 2, n_feat: int = 64, n_cfeat: int = 0) -> None:
        super().__init__()
        if features < 1 or n_feat < 1 or n_cfeat < 0:
            raise ValueError(f"features, n_feat, n_cfeat: got {features}, {n_feat}, {n_cfeat}, needs >= 1, >= 1, >= 0")
        self.features, self.n_feat, self.n_cfeat = features, n_feat, n_cfeat
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(self.FREQUENCIES), persistent=False)
        self.inp = nn.Linear(features, n_feat)
        self.embed = EmbedFC(2 * self.FREQUENCIES + n_cfeat, n_feat)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(n_feat, n_feat), nn.GELU(), nn.Linear(n_feat, n_feat), nn.GELU())
            for _ in range(self.BLOCKS)
        )
        self.out = nn.Linear(n_feat, features)

    @property
    def sample_shape(self) -> tuple[int]:
        """Shape of one sample: (features,)."""
        return (self.features,)

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        return {
            "kind": "point_mlp",
            "features": self.features,
            "n_feat": self.n_feat,
            "n_cfeat": self.n_cfeat,
        }

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x: got shape {list(x.shape)}, needs [n, {self.features}]")
        _check_condition(x, t, c, self.n_cfeat)
        angles = t.to(x.dtype).reshape(-1, 1) * self.frequencies
        condition = x.new_zeros(x.shape[0], self.n_cfeat) if c is None else c.to(x.dtype)
        embedding = self.embed(torch.cat((angles.sin(), angles.cos(), condition), dim=1))
        hidden = self.inp(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + embedding)
        return self.out(hidden)


KINDS = {"context_unet": ContextUnet, "point_mlp": PointMLP}


def build_network(config: Mapping[str, object]) -> nn.Module:
    """The network that `config()` described. Raises ValueError for an unknown kind or unknown arguments."""
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"model kind: got {kind!r}, needs one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"model: {error}") from error


def fit_state_dict(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load a state dict that must fit exactly.

    Raises ValueError naming the first entry that is missing, of another shape or kind of type, not finite, or too many.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in given:
            raise ValueError(f"has no entry {name!r}, the network needs {list(tensor.shape)}: from another network?")
        if given[name].shape != tensor.shape:
            raise ValueError(f"{name!r} is {list(given[name].shape)}, the network needs {list(tensor.shape)}")
        if given[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name!r} is {given[name].dtype}, the network needs {tensor.dtype}")
        if not given[name].isfinite().all():
            raise ValueError(f"{name!r} has NaN or infinite values, the network needs finite ones")
    extra = next((name for name in given if name not in own), None)
    if extra is not None:
        raise ValueError(f"has {extra!r}, which the network does not: from another network?")
    model.load_state_dict(dict(given))


def load_context_unet_weights(model: ContextUnet, state_dict: Mapping[str, Tensor]) -> None:
    """Load a published ContextUnet state dict, with or without the shortcut.

    The original made its shortcut convolution anew, at random, in every call, so published weights have none: it
    becomes zero, the expectation of that random convolution, and a warning says so.

    Raises ValueError as `fit_state_dict` does.
    """
    given = dict(state_dict)
    shortcut = [name for name in model.state_dict() if name.startswith(SHORTCUT_PREFIX)]
    without = bool(shortcut) and not any(name in given for name in shortcut)
    if without:
        given |= {name: torch.zeros_like(model.state_dict()[name]) for name in shortcut}
    try:
        fit_state_dict(model, given)
    except ValueError as error:
        raise ValueError(f"state dict: {error}") from error
    if without:
        warnings.warn(
            "these weights have no init_conv.shortcut (the original made it at random in every call): set to zero",
            stacklevel=2,
        )
