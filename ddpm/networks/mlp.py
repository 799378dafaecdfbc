"""PointMLP: a small residual network for points, as the Swiss roll has them."""

import torch
from torch import Tensor, nn

from ddpm.networks.blocks import EmbedFC
from ddpm.networks.protocol import ZeroIsNone, check_call, network


@network("mlp")
class PointMLP(ZeroIsNone):
    """A small residual MLP for points: forward(x [n, features], t [n], c [n, n_cfeat] or None) -> [n, features].

    t enters as sines and cosines of 2^k pi t, k = 0..7 (Mildenhall et al. 2020, equation 4), added in each block.
    """

    time = "fraction"
    BLOCKS = 3
    FREQUENCIES = 8

    def __init__(self, features: int = 2, n_feat: int = 64, n_cfeat: int = 0) -> None:
        super().__init__()
        if features < 1 or n_feat < 1 or n_cfeat < 0:
            raise ValueError(f"features, n_feat, n_cfeat: got {features}, {n_feat}, {n_cfeat}, needs >= 1, >= 1, >= 0")
        self.features, self.n_feat, self.n_cfeat = features, n_feat, n_cfeat
        self.condition_shape = (n_cfeat,) if n_cfeat else None
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
        return {"features": self.features, "n_feat": self.n_feat, "n_cfeat": self.n_cfeat}

    @classmethod
    def for_data(cls, shape: tuple[int, ...], classes: int, n_feat: int) -> "PointMLP":
        """For points of this shape (features,); without classes unconditional."""
        if len(shape) != 1:
            raise ValueError(f"network: mlp is for points, the data have {list(shape)}")
        return cls(shape[0], n_feat, classes)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x [n, features], t [n] in (0, 1], c [n, n_cfeat] or None = zeros -> [n, features]."""
        t = check_call(self, x, t, c)
        angles = t.to(x.dtype).reshape(-1, 1) * self.frequencies
        condition = x.new_zeros(x.shape[0], self.n_cfeat) if c is None else c.to(x.dtype)
        embedding = self.embed(torch.cat((angles.sin(), angles.cos(), condition), dim=1))
        hidden = self.inp(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + embedding)
        return self.out(hidden)
