"""UNet2D: diffusers' UNet2DModel behind the protocol, under its own arguments and (behind `unet.`) parameter names.

diffusers is imported when such a network is made. A model with `num_class_embeds` K has conditions of K numbers that
weigh the rows of its embedding: one-hot is that class, as there. No condition is `null_class`, which its training put
in place of a dropped label, or no embedding at all (zeros), as `ddpm train` has it. With `class_embed_type` "identity"
a condition is the embedding itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.errors import check_choice, check_integer
from ddpm.extras import need
from ddpm.networks.protocol import check_call, network
from ddpm.sizes import sides_of

TIME_EMBEDDINGS = ("positional", "learned")
LEVELS_MAX = 16  # at 16 sides are multiples of 32,768 pixels
LAYERS_MAX = 64  # of a level; a network of more is a damaged file's
# For data: halved to at most 8 pixels, widths 1, 2, 4, 4.. times n_feat, attention on the innermost level.
INNERMOST_SIDE, WIDEST = 8, 4


class _Classes(nn.Embedding):
    """The rows of an embedding, weighed: c [n, K] -> [n, width]."""

    def forward(self, c: Tensor) -> Tensor:
        return c.to(self.weight.dtype) @ self.weight


class _Upsample(nn.Module):
    """diffusers' Upsample2D with its convolution, without its question for the batch, which exporters would fix."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        return self.conv(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the argument, for a UNet2DModel that is no network of ours."""
    get = arguments.get
    channels, levels = get("in_channels", 3), get("block_out_channels", (224, 448, 672, 896))
    check_integer("in_channels", channels)
    if get("out_channels", 3) != channels:
        twice = get("out_channels", 3) == 2 * channels
        kind = "a learned variance" if twice else "something else than the noise of its input"
        raise ValueError(f"out_channels: got {get('out_channels', 3)!r}, which is {kind}, needs {channels}")
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= LEVELS_MAX:
        raise ValueError(f"block_out_channels: got {str(levels)[:80]}, needs a list of 1..{LEVELS_MAX} widths")
    for width in levels:
        check_integer("block_out_channels", width)
    for side in sides_of(get("sample_size"), "sample_size"):
        if side % 2 ** (len(levels) - 1):
            raise ValueError(f"sample_size: got {side}, needs a multiple of {2 ** (len(levels) - 1)}")
    layers = get("layers_per_block", 2)
    check_integer("layers_per_block", layers)
    if layers > LAYERS_MAX:
        raise ValueError(f"layers_per_block: got {layers}, needs at most {LAYERS_MAX}")
    check_choice("time_embedding_type", get("time_embedding_type", "positional"), TIME_EMBEDDINGS)
    if get("class_embed_type") not in (None, "identity"):
        raise ValueError(f"class_embed_type: got {get('class_embed_type')!r}, needs null (with classes) or 'identity'")
    if get("dropout", 0.0) != 0.0:
        raise ValueError(f"dropout: got {get('dropout')!r}, needs 0: its coins are not those of the noise contract")


@network("unet2d")
class UNet2D(nn.Module):
    """forward(x [n, C, H, W], t int64 [n] from 0, c [n, K] or None) -> [n, C, H, W].

    arguments: of diffusers' UNet2DModel. null_class: the class that stands for no condition, or None: zeros do. Raises
    ValueError naming the argument, ModuleNotFoundError without diffusers.
    """

    time = "index"

    def __init__(self, null_class: int | None = None, **arguments: Any) -> None:
        super().__init__()
        need("diffusers")
        from diffusers import UNet2DModel
        from diffusers.models.upsampling import Upsample2D

        check_arguments(arguments)
        self.null_class, self.arguments = null_class, arguments
        self.unet = UNet2DModel(**arguments)
        self.sample_shape = (self.unet.config.in_channels, *sides_of(self.unet.config.sample_size))
        self.continuous_time = self.unet.config.get("time_embedding_type") != "learned"
        for block in self.unet.up_blocks:
            for k, each in enumerate(getattr(block, "upsamplers", None) or ()):
                if isinstance(each, Upsample2D) and each.use_conv and each.name == "conv" and each.norm is None:
                    block.upsamplers[k] = _Upsample(each.conv)
        self.condition_shape = None
        if isinstance(self.unet.class_embedding, nn.Embedding):
            self.condition_shape = (self.unet.class_embedding.num_embeddings,)
            self.unet.class_embedding = _Classes(*self.unet.class_embedding.weight.shape)
        elif self.unet.class_embedding is not None:
            self.condition_shape = (self.unet.time_embedding.linear_2.out_features,)
        if null_class is not None:
            count = 0 if self.condition_shape is None else self.condition_shape[0]
            check_integer("null_class", null_class, 0)
            if null_class >= count:
                raise ValueError(f"null_class: got {null_class}, needs one of the network's {count} classes")

    def config(self) -> dict[str, object]:
        """The arguments that build this network again."""
        return self.arguments | ({} if self.null_class is None else {"null_class": self.null_class})

    @classmethod
    def for_data(cls, shape: tuple[int, ...], classes: int, n_feat: int) -> "UNet2D":
        """For images of this shape; n_feat: width of the first level."""
        if len(shape) != 3:
            raise ValueError(f"network: unet2d is for images, the data have {list(shape)}")
        channels, *sides = shape
        levels = 1
        while min(sides) >> (levels - 1) > INNERMOST_SIDE and not any(side % 2**levels for side in sides):
            levels += 1
        plain = ["2D"] * (levels - 1)
        return cls(
            sample_size=sides[0] if sides[0] == sides[1] else sides,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=[n_feat * min(2**level, WIDEST) for level in range(levels)],
            down_block_types=[*("DownBlock" + kind for kind in plain), "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", *("UpBlock" + kind for kind in plain)],
            norm_num_groups=math.gcd(n_feat, 32),
            num_class_embeds=classes or None,
        )

    def null_condition(self, n: int) -> Tensor:
        """[n, K]: zeros, or one-hot of `null_class`, made where the network is."""
        nothing = torch.zeros(n, *(self.condition_shape or (0,)), device=self.unet.conv_in.weight.device)
        if self.null_class is not None:
            nothing[:, self.null_class] = 1.0
        return nothing

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x [n, C, H, W], t [n] counted from 0, whole or (unless learned) not, c [n, K] or None -> [n, C, H, W]."""
        t = check_call(self, x, t, c)
        if self.condition_shape is None:
            c = None
        elif c is None:
            c = self.null_condition(x.shape[0])
        return self.unet(x, t, class_labels=c, return_dict=False)[0]
