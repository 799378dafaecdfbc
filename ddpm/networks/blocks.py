"""Building blocks that networks share; parameter names are part of published weights."""

import math

import torch
from torch import Tensor, nn


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
        first, second = ResidualConvBlock(in_channels, out_channels), ResidualConvBlock(out_channels, out_channels)
        self.model = nn.Sequential(first, second, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UnetUp(nn.Module):
    """Concatenation with the skip, a 2x2 transposed convolution, two blocks: [n, in, h, w] -> [n, out, 2h, 2w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        first, second = (ResidualConvBlock(out_channels, out_channels) for _ in range(2))
        self.model = nn.Sequential(conv, first, second)

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


class Sinusoidal(nn.Module):
    """Sines and cosines of t theta^(-i / (d/2 - 1)), i = 0..d/2 - 1: [n] -> float32 [n, d]."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        # In float32 whatever the network's type, as weights were trained: at t = 1000 its rounding can be seen.
        frequencies = torch.exp(torch.arange(half, device=time.device) * -(math.log(self.theta) / (half - 1)))
        angles = time.reshape(-1, 1) * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
