"""The form of a ContextUnet. What sampling exploits, each exact up to rounding:

    BatchNorm in eval mode is affine, so it joins its convolution:
        w' = w gamma / sqrt(var + eps)      b' = (b - mean) gamma / sqrt(var + eps) + beta
    t takes S values in a run, so the time embeddings are tables [S, C]; the context embeddings are computed once.
    Encoder, bottleneck and its normalisation see neither, so guidance shares them between its two halves.
    The first block's sum is divided by 1.414 in the weights that read it.
    Over cat(x, skip) a convolution is a sum of two, and guidance shares the skip's.

With `Layout.kernels` a call at 16x16 is 25 launches: bias, GELU, the shortcut's sum, pooling and the gates are in them.
"""

import copy
import logging
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ddpm.inference.convolutions import Chain, Convolution, Merging, Upsampling, store
from ddpm.inference.form import FORMS, Form, Layout, Rows, laid_out
from ddpm.networks.blocks import ResidualConvBlock
from ddpm.networks.context_unet import GROUPS, ContextUnet
from kernels import bottleneck, group_norm_relu
from kernels.convolution import POOL
from kernels.winograd import PANEL, fits, missing

logger = logging.getLogger("ddpm")

GATED_LEVELS = 2
Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(model: Network, dtype: torch.dtype | None = None) -> Network:
    """A copy in eval mode, every BatchNorm of a `ResidualConvBlock` folded into its convolution in float64.

    Of `dtype`, default the model's.
    """
    dtype = dtype or next(model.parameters()).dtype
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    for block in model.modules():
        if isinstance(block, ResidualConvBlock):
            for half in (block.conv1, block.conv2):
                half[0], half[1] = fuse_conv_bn_eval(half[0], half[1]), nn.Identity()
    return model.to(dtype)


class Normalisation(nn.Module):
    """GroupNorm and ReLU of the head."""

    def load(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        store(self, gain=norm.weight.to(dtype), offset=norm.bias.to(dtype))
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_relu(x, self.gain, self.offset, GROUPS, self.eps)


class Bottleneck(Normalisation):
    """From the deepest features to the first gate, once for each half's scale: x [n, C, h, w] -> [k * n, C, h, w]."""

    def load(self, up0: nn.Sequential, dtype: torch.dtype, layout: Layout) -> None:
        conv, norm, _ = up0
        weight = conv.weight.to(dtype).contiguous(memory_format=layout.memory_format)
        store(self, weight=weight, bias=conv.bias.to(dtype))
        super().load(norm, dtype)

    def forward(self, x: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
        """scale: [k, n, C] or None; shift: [1, C]."""
        return bottleneck(x, self.weight, self.bias, self.gain, self.offset, scale, shift, GROUPS, self.eps)


class ContextUnetForm(Form):
    """forward(x, table_row, rows) -> m [k * n, C, H, W] for x [n, C, H, W], computed in dtype."""

    in_operators = True

    def __init__(self, model: ContextUnet, dtype: torch.dtype, layout: Layout | None = None) -> None:
        super().__init__(dtype)
        self.layout = layout or Layout()
        self.depth, self.n_cfeat = model.depth, model.n_cfeat
        self.shortcut = None if isinstance(model.init_conv.shortcut, nn.Identity) else Convolution()
        self.initial = Chain(2)
        self.downs = nn.ModuleList(Chain(4) for _ in range(self.depth))
        self.bottleneck = Bottleneck()
        self.upsamplings = nn.ModuleList(Upsampling() for _ in range(self.depth))
        self.ups = nn.ModuleList(Chain(4) for _ in range(self.depth))
        self.head, self.normalisation, self.last = Merging(), Normalisation(), Convolution()
        kind = torch.promote_types(dtype, torch.float32)
        embeddings = {name: child for name, child in model.named_children() if "embed" in name}
        self.embeddings = nn.ModuleDict({name: copy.deepcopy(child).to(kind) for name, child in embeddings.items()})
        self.requires_grad_(False)
        self.refresh(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        transformed = any(module.transformed for module in self.modules() if isinstance(module, Convolution))
        if on_cpu and not transformed and dtype == torch.float32 and self.layout == Layout():
            fits_any = any(map(fits, model.parameters()))
            lack = missing() if fits_any else f"no convolution has channels in multiples of {PANEL} (n_feat)"
            logger.info("convolutions are the library's, about a third as fast as the operator winograd: %s", lack)

    @torch.no_grad()
    def refresh(self, model: ContextUnet) -> None:
        """Fold the model's present weights. Shapes stay, so what compiled this form serves on."""
        model = fold_batch_norm(model, torch.float64)
        kept = self.dtype, self.layout

        def load(chain: Chain, *blocks: ResidualConvBlock) -> None:
            convolutions = [half[0] for block in blocks for half in (block.conv1, block.conv2)]
            for own, conv in zip(chain, convolutions, strict=True):
                own.load(conv.weight, conv.bias, *kept)

        load(self.initial, model.init_conv)
        if self.shortcut is not None:
            self.shortcut.load(model.init_conv.shortcut.weight, model.init_conv.shortcut.bias, *kept)
        # What reads the first block's sum divides it by 1.414 itself: one pass over its features is saved.
        for reader in (model.down1.model[0].conv1[0].weight, model.out[0].weight.chunk(2, dim=1)[1]):
            reader.div_(1.414)
        for level in range(1, self.depth + 1):
            down, up = getattr(model, f"down{level}").model, getattr(model, f"up{level}").model
            load(self.downs[level - 1], down[0], down[1])
            self.upsamplings[level - 1].load(up[0], *kept)
            load(self.ups[level - 1], up[1], up[2])
        self.bottleneck.load(model.up0, *kept)
        merge, norm, _, last = model.out
        self.head.load(merge.weight, merge.bias, *kept)
        self.normalisation.load(norm, self.dtype)
        self.last.load(last.weight, last.bias, *kept)
        for name, own in self.embeddings.items():
            own.load_state_dict(getattr(model, name).state_dict())

    def _embedded(self, kind: str, value: Tensor) -> tuple[Tensor, ...]:
        like = next(self.embeddings.parameters())
        names = (f"{kind}embed{level}" for level in range(1, GATED_LEVELS + 1))
        return tuple(self.embeddings[name](value.to(like)).to(self.dtype) for name in names)

    @torch.no_grad()
    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        return self._embedded("time", times.reshape(-1, 1))

    @torch.no_grad()
    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        if self.n_cfeat == 0:
            return None
        like = next(self.embeddings.parameters())
        if condition is not None and condition.shape[1:] != (self.n_cfeat,):
            raise ValueError(f"c: got shape {list(condition.shape)}, needs [{n}, {self.n_cfeat}]")
        condition = like.new_zeros(n, self.n_cfeat) if condition is None else condition.to(like)
        halves = torch.stack((condition, torch.zeros_like(condition))) if guided else condition[None]
        return tuple(scale.unflatten(0, halves.shape[:2]) for scale in self._embedded("context", halves))

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows) -> Tensor:
        """As in `Form`. x may be wider than the network's type."""
        x = laid_out(x, self.dtype, self.layout)
        if not self.layout.shared and rows is not None:
            x, rows = torch.cat((x,) * rows[0].shape[0]), tuple(row.flatten(0, 1)[None] for row in rows)
        skips = [self.initial(x, onto=x) if self.shortcut is None else self.shortcut(x, onto=self.initial(x))]
        for down in self.downs:
            skips.append(down(skips[-1], then=POOL))
        first, second = (None, None) if rows is None else rows
        up = self.bottleneck(skips[-1], first, table_row[0])
        gate = None if second is None else second.flatten(0, 1), table_row[1]
        for level, (upsampling, blocks) in enumerate(zip(self.upsamplings, self.ups, strict=True)):
            up = blocks(upsampling(up, skips.pop()), gate=gate if level == 0 else None)
        shared = self.head.share(skips.pop())  # the widest features go here, where memory is at its peak
        return self.last(self.normalisation(self.head(up, shared)))


FORMS[ContextUnet] = ContextUnetForm
