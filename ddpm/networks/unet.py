"""Unet: the U-Net of denoising_diffusion_pytorch by its arguments and parameter names, so that its weights load.

    y    = conv3x3(x)                                                   a half of a residual block
    out  = SiLU(y / |y|_2 g sqrt(C) (1 + scale(t)) + shift(t))          |.|_2 over channels; the second half without t

A level is two residual blocks, attention (softmax(q) (softmax(k) v^T), Shen et al. 2018, or full) and a change of size;
the way up reads what each second block and each attention of the way down left. Former versions: see `unet_versions`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.errors import check_integer, check_number
from ddpm.former_arguments import only, understands
from ddpm.networks import unet_versions
from ddpm.networks.blocks import Sinusoidal
from ddpm.networks.protocol import network
from ddpm.networks.unet_versions import PRESENT, GroupNorm, LayerNorm, Nested, StandardizedConv2d, Structure
from ddpm.sizes import sides_of
from ddpm.table import FLOAT64_MAX

MEMORY = 4  # learned keys and values that every attention sees beside the pixels
NOT_BUILT = ("learned_variance", "learned_sinusoidal_cond", "random_fourier_features")
LEVELS = (1, 2, 4, 8)
ATTN_HEADS, ATTN_DIM_HEAD = 4, 32


class RMSNorm(nn.Module):
    """x / |x|_2 * g sqrt(C), over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    @property
    def gain(self) -> Tensor:
        """g sqrt(C): [1, C, 1, 1]."""
        return self.g * math.sqrt(self.g.shape[1])

    def film(self, scale: Tensor, shift: Tensor) -> Tensor:
        """(gain with the scale in it, shift) of what is normalised: [n, 2 C, 1, 1] of twice [n, C, 1, 1]."""
        return torch.cat((self.gain * (1 + scale), shift), dim=1)

    def normalized(self, x: Tensor) -> Tensor:
        """x without the gain."""
        return F.normalize(x, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x) * self.gain


class Block(nn.Module):
    """A half of a residual block; film: (gain with the scale in it, shift), each [n, C, 1, 1]."""

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0, groups: int = 0, standard: bool = False) -> None:
        super().__init__()
        self.proj = (StandardizedConv2d if standard else nn.Conv2d)(dim, dim_out, 3, padding=1)
        self.norm = GroupNorm(groups, dim_out) if groups else RMSNorm(dim_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.proj(x)
        x = self.norm(x) if film is None else self.norm.normalized(x) * film[0] + film[1]
        return self.dropout(F.silu(x))


class ResnetBlock(nn.Module):
    """Two halves, the first told the time, and a shortcut: [n, dim, h, w] -> [n, dim_out, h, w]."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, dropout: float, *how: int | bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1 = Block(dim, dim_out, dropout, *how)
        self.block2 = Block(dim_out, dim_out, 0.0, *how)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def film(self, embedding: Tensor) -> Tensor:
        """What the first half reads of a time: [n, 2 dim_out, 1, 1]."""
        return self.block1.norm.film(*self.mlp(embedding)[:, :, None, None].chunk(2, dim=1))

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        return self.block2(self.block1(x, film.chunk(2, dim=1))) + self.res_conv(x)


def _norm(dim: int, form: Structure) -> nn.Module:
    return LayerNorm(dim, form.bias) if form.layer_norm else RMSNorm(dim)


def _with_memory(memory: Tensor | None, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Keys and values, after those of the memory along dim."""
    if memory is None:
        return k, v
    pairs = zip(memory.expand(k.shape[0], *memory.shape).unbind(1), (k, v), strict=True)
    return tuple(torch.cat(pair, dim=dim) for pair in pairs)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in pixels; normalised before and after."""

    def __init__(self, dim: int, heads: int, dim_head: int, form: Structure) -> None:
        super().__init__()
        self.split, self.divided = (3, heads, dim_head), form.divided
        self.norm = nn.Identity() if form.nested else _norm(dim, form)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, MEMORY)) if form.memory else None
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), _norm(dim, form))

    def forward(self, x: Tensor) -> Tensor:
        (n, _, h, w), (_, _, dim_head) = x.shape, self.split
        q, k, v = self.to_qkv(self.norm(x)).reshape(n, *self.split, h * w).unbind(1)  # [n, heads, dim_head, pixels]
        k, v = _with_memory(self.mem_kv, k, v / (h * w) if self.divided else v, -1)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)
        out = context.transpose(-1, -2) @ (q.softmax(dim=-2) * dim_head**-0.5)
        return self.to_out(out.reshape(n, -1, h, w))


class Attention(nn.Module):
    """Attention of every pixel to every pixel and to the memory."""

    def __init__(self, dim: int, heads: int, dim_head: int, form: Structure) -> None:
        super().__init__()
        self.split, self.scale = (3, heads, dim_head), form.scale
        self.norm = nn.Identity() if form.nested else _norm(dim, form)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, MEMORY, dim_head)) if form.memory else None
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        split = self.to_qkv(self.norm(x)).reshape(n, *self.split, h * w)
        q, k, v = split.transpose(-1, -2).unbind(1)  # [n, heads, pixels, dim_head]
        k, v = _with_memory(self.mem_kv, k, v, -2)
        if self.scale:  # of the length over pixels, not over channels, as weights were trained
            q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale or None)
        return self.to_out(out.transpose(-1, -2).reshape(n, -1, h, w))


def _per_level(name: str, value: object, levels: int, kind: type) -> tuple:
    """One value for all levels, or one for each. Raises ValueError."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    fits = all(type(each) is kind and (kind is bool or each >= 1) for each in values)
    if len(values) != levels or not fits:
        needs = "True or False" if kind is bool else "an integer >= 1"
        raise ValueError(f"{name}: got {value!r}, needs {needs}, or {levels} of them, one a level")
    return values


@network("unet")
class Unet(nn.Module):
    """The U-Net of denoising_diffusion_pytorch. Raises ValueError naming the argument that does not fit.

    Args:
        dim: base width, even, at least 4. init_dim: width of the first level (dim). out_dim: of the output (channels).
        dim_mults: width of each level in units of dim; sides must be divisible by 2^(levels - 1).
        channels: of the images. self_condition: forward also takes the estimate of x0 that came before.
        sinusoidal_pos_emb_theta: longest period of the time's embedding, in units of 2 pi. dropout: of residual blocks.
        attn_dim_head, attn_heads, full_attn: one value, or one a level; full attention by default innermost alone, and
            before 1.8 in no level.
        flash_attn, learned_sinusoidal_dim: taken and without effect: attention is PyTorch's fastest in any case.
        image_size: side of the images to be drawn, or (height, width). The weights do not depend on it; a
            `GaussianDiffusion` fills it in.
        version: the release that has this network, say "1.5.4", from 0.22 on; None: the present one, of 2.0 and later.
        resnet_block_groups: of GroupNorm, which networks before 2.0 have (8); alone it means version 1.9 to 1.11.
    learned_variance, learned_sinusoidal_cond and random_fourier_features are not built and refused.
    """

    time = "index"
    condition_shape = None

    @understands(
        with_time_emb=only(True, "True: all networks here are told the time"),
        sinusoidal_cond_mlp=only(True, "True"),
        use_convnext=only(False, "False: residual blocks"),
        groups=only(None, "resnet_block_groups; networks before 0.7, which had it, are not built"),
    )
    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = LEVELS,
        channels: int = 3,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        dropout: float = 0.0,
        attn_dim_head: int | Sequence[int] = ATTN_DIM_HEAD,
        attn_heads: int | Sequence[int] = ATTN_HEADS,
        full_attn: bool | Sequence[bool] | None = None,
        flash_attn: bool = False,
        image_size: int | Sequence[int] | None = None,
        *,
        version: str | None = None,
        resnet_block_groups: int | None = None,
    ) -> None:
        super().__init__()
        asked = (learned_variance, learned_sinusoidal_cond, random_fourier_features)
        for name, value in zip(NOT_BUILT, asked, strict=True):
            if value:
                raise ValueError(f"{name}: got {value!r}, which this Unet does not build, needs False")
        check_integer("dim", dim, 4)
        if dim % 2:
            raise ValueError(f"dim: got {dim}, needs an even number (half sines, half cosines)")
        init_dim, out_dim = dim if init_dim is None else init_dim, channels if out_dim is None else out_dim
        for name, value in (("channels", channels), ("init_dim", init_dim), ("out_dim", out_dim)):
            check_integer(name, value)
        if not isinstance(dim_mults, list | tuple) or not dim_mults:
            raise ValueError(f"dim_mults: got {dim_mults!r}, needs a tuple of integers >= 1, one a level")
        count = len(dim_mults)
        mults = _per_level("dim_mults", dim_mults, count, int)
        release = unet_versions.release_of(version, resnet_block_groups)
        form = unet_versions.STRUCTURES[release]
        full = _per_level("full_attn", full_attn or [False] * (count - 1) + [not form.nested], count, bool)
        heads = _per_level("attn_heads", attn_heads, count, int)
        dim_heads = _per_level("attn_dim_head", attn_dim_head, count, int)
        check_number("dropout", dropout, 0, math.nextafter(1, 0), "a share, 0 or more and below 1")
        check_number("sinusoidal_pos_emb_theta", sinusoidal_pos_emb_theta, 1, FLOAT64_MAX, "a finite number >= 1")
        self.channels, self.out_dim, self.self_condition = channels, out_dim, bool(self_condition)
        self.downsample_factor = 2 ** (count - 1)
        sides = () if image_size is None else sides_of(image_size)
        if any(side % self.downsample_factor for side in sides):
            needs = f"a multiple of {self.downsample_factor} for {count} levels"
            raise ValueError(f"image_size: got {image_size}, needs {needs}")
        self.sample_shape = (channels, *sides) if sides else None
        self._config = {"dim": dim, "init_dim": init_dim, "out_dim": out_dim, "dim_mults": list(mults)}
        self._config |= {"channels": channels, "self_condition": self.self_condition, "dropout": dropout}
        self._config |= {"sinusoidal_pos_emb_theta": sinusoidal_pos_emb_theta, "attn_dim_head": list(dim_heads)}
        self._config |= {"attn_heads": list(heads), "full_attn": list(full)}
        time_dim = 4 * dim
        widths = [init_dim, *(dim * mult for mult in mults)]
        last, deepest = count - 1, widths[-1]
        groups = unet_versions.groups_of(release, resnet_block_groups, widths)
        if release != PRESENT:
            self._config |= {"version": release, "resnet_block_groups": groups}

        def resnet(dim_in: int, dim_out: int) -> ResnetBlock:
            return ResnetBlock(dim_in, dim_out, time_dim, dropout, groups, form.standardized)

        def attention(width: int, level: int, whole: bool) -> nn.Module:
            made = (Attention if whole else LinearAttention)(width, heads[level], dim_heads[level], form)
            return Nested(_norm(width, form), made) if form.nested else made

        # In this order a seed makes the weights that it makes there.
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), init_dim, 7, padding=3)
        embedding = nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        self.time_mlp = nn.Sequential(Sinusoidal(dim, sinusoidal_pos_emb_theta), *embedding)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (wide, deeper) in enumerate(pairwise(widths)):
            parts = [resnet(wide, wide), resnet(wide, wide), attention(wide, level, full[level])]
            if level == last:
                smaller = nn.Conv2d(wide, deeper, 3, padding=1)
            elif form.strided:
                smaller = nn.Conv2d(wide, deeper, 4, stride=2, padding=1)
            else:
                smaller = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * wide, deeper, 1))
            self.downs.append(nn.ModuleList([*parts, smaller]))
        self.mid_block1 = resnet(deepest, deepest)
        self.mid_attn = attention(deepest, last, whole=True)
        self.mid_block2 = resnet(deepest, deepest)
        for level in reversed(range(count)):
            wide, deeper = widths[level], widths[level + 1]
            parts = [resnet(deeper + wide, deeper), resnet(deeper + wide, deeper)]
            parts.append(attention(deeper, level, full[level]))
            larger = nn.Conv2d(deeper, wide, 3, padding=1)
            if level > 0:
                larger = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), larger)
            self.ups.append(nn.ModuleList([*parts, larger]))
        self.final_res_block = resnet(2 * init_dim, init_dim)
        self.final_conv = nn.Conv2d(init_dim, out_dim, 1)

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        return self._config | {"image_size": None if self.sample_shape is None else list(self.sample_shape[1:])}

    @classmethod
    def for_data(
        cls,
        shape: tuple[int, ...],
        classes: int,
        n_feat: int,
        multipliers: Sequence[int] | None = None,
        self_condition: bool = False,
        attn_heads: int = ATTN_HEADS,
        attn_dim_head: int = ATTN_DIM_HEAD,
    ) -> "Unet":
        """For images of this shape (C, H, W) without classes; as many levels, at most four, as the sides halve."""
        if len(shape) != 3:
            raise ValueError(f"network: unet is for images, the data have {list(shape)}")
        if classes:
            raise ValueError(f"network: unet takes no classes, the data have {classes}, needs unlabelled images")
        channels, *sides = shape
        levels = next(count for count in (4, 3, 2, 1) if not any(side % 2 ** (count - 1) for side in sides))
        own = {"self_condition": self_condition, "attn_heads": attn_heads, "attn_dim_head": attn_dim_head}
        return cls(n_feat, dim_mults=multipliers or LEVELS[:levels], channels=channels, image_size=sides, **own)

    def films(self, time: Tensor) -> tuple[Tensor, ...]:
        """What depends on time alone: for each residual block in order [n, 2 C, 1, 1]. time: [n], whole or not."""
        angles, *layers = self.time_mlp
        embedding = angles(time).to(layers[0].weight.dtype)
        for layer in layers:
            embedding = layer(embedding)
        down, up = ([block for level in way for block in level[:2]] for way in (self.downs, self.ups))
        blocks = (*down, self.mid_block1, self.mid_block2, *up, self.final_res_block)
        return tuple(block.film(embedding) for block in blocks)

    def denoise(self, x: Tensor, films: Sequence[Tensor], x0_previous: Tensor | None = None) -> Tensor:
        """The output for x [n, C, H, W], what `films` gave, and x0_previous [n, C, H, W] or None = zeros."""
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x0_previous is None else x0_previous, x), dim=1)
        film = iter(films)
        x = first = self.init_conv(x)
        skips = []
        for block1, block2, attention, smaller in self.downs:
            skips.append(block1(x, next(film)))
            x = block2(skips[-1], next(film))
            skips.append(attention(x) + x)
            x = smaller(skips[-1])
        x = self.mid_block1(x, next(film))
        x = self.mid_block2(self.mid_attn(x) + x, next(film))
        for block1, block2, attention, larger in self.ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), next(film))
            x = block2(torch.cat((x, skips.pop()), dim=1), next(film))
            x = larger(attention(x) + x)
        return self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), next(film)))

    def forward(
        self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None, x0_previous: Tensor | None = None
    ) -> Tensor:
        """x [n, C, H, W], time [n] counted from 0, whole or not -> [n, out_dim, H, W].

        x_self_cond [n, C, H, W] or None = zeros: with self_condition, the estimate of x0 that came before. x0_previous:
        the same in the place where engines give it; the third argument of a network is its condition, here None.
        """
        factor, n = self.downsample_factor, x.shape[0]
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % factor or x.shape[3] % factor:
            needs = f"[n, {self.channels}, H, W] with sides divisible by {factor}"
            raise ValueError(f"x: got shape {list(x.shape)}, needs {needs}")
        if time.numel() != n:
            raise ValueError(f"time: got shape {list(time.shape)}, needs [{n}], one time per row of x")
        estimate = x0_previous if x_self_cond is None else x_self_cond
        if estimate is not None and not (self.self_condition and estimate.shape == x.shape):
            needs = f"the shape of x {list(x.shape)}" if self.self_condition else "None without self_condition"
            raise ValueError(f"x_self_cond: got shape {list(estimate.shape)}, needs {needs}")
        return self.denoise(x, self.films(time), estimate)
