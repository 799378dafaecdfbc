"""The form of a SimpleUNet. What sampling exploits, each exact up to rounding:

BatchNorm joins its convolution; the time's shifts are tables [S, C], the condition's are computed once.
The way down is not told the condition, so guidance shares it, and the first half of the block at the bottom.
Over cat(x, skip) a convolution of either kind is a sum of two, and guidance shares the skip's.
"""

import copy

import torch
from torch import Tensor, nn

from ddpm.inference.context_unet import Normalisation, fold_batch_norm
from ddpm.inference.convolutions import Convolution, Merging, Upsampling
from ddpm.inference.form import FORMS, Form, Layout, Rows, halves, laid_out
from ddpm.networks.simple_unet import ShiftedBlock, SimpleUNet
from kernels.convolution import KEEP, POOL
from kernels.placed import placed
from kernels.shifted import shifted


class Block(nn.Module):
    """A block with its BatchNorms folded in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Convolution(gelu=True), Convolution(gelu=True)

    def load(self, block: ShiftedBlock, dtype: torch.dtype, layout: Layout) -> None:
        for own, half in ((self.first, block.conv1), (self.second, block.conv2)):
            own.load(half[0].weight, half[0].bias, dtype, layout)

    def forward(self, x: Tensor, shift: Tensor, then: str = KEEP) -> Tensor:
        """shift: [1 or n, C]; or [k, n, C] for x [n, ...] that k halves share -> [k * n, ...]."""
        if shift.ndim == 3:
            y = self.first(x)
            y = shifted(y, shift) if self.first.fused else (y + shift[..., None, None]).flatten(0, 1)
            return self.second(y, then=then)
        return self.second(self.first(x, gate=(None, shift)), then=then)


class SimpleUNetForm(Form):
    """forward(x, table_row, rows) -> m [k * n, C, H, W] for x [n, C, H, W], computed in dtype."""

    in_operators = True

    def __init__(self, model: SimpleUNet, dtype: torch.dtype, layout: Layout | None = None) -> None:
        super().__init__(dtype)
        self.layout, self.padding = layout or Layout(), copy.deepcopy(model.padding)
        self.n_cfeat, self.depth = model.n_cfeat, len(model.multipliers)
        self.conv0 = Convolution()
        self.downs, self.ups = (nn.ModuleList(Block() for _ in range(self.depth)) for _ in range(2))
        self.middle = Block()
        self.upsamplings = nn.ModuleList(Upsampling() for _ in range(self.depth))
        self.head, self.normalisation, self.last = Merging(), Normalisation(), Convolution()
        self.shifts = copy.deepcopy(model.shifts).to(torch.promote_types(dtype, torch.float32))
        self.requires_grad_(False)
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: SimpleUNet) -> None:
        """Fold the model's present weights. Shapes stay, so what compiled this form serves on."""
        model = fold_batch_norm(model, torch.float64)
        kept = self.dtype, self.layout
        blocks = (*model.downs, model.middle, *model.ups)
        for own, block in zip((*self.downs, self.middle, *self.ups), blocks, strict=True):
            own.load(block, *kept)
        for own, transform in zip(self.upsamplings, model.transforms, strict=True):
            own.load(transform, *kept)
        merge, norm, _, last = model.out
        for own, conv in ((self.conv0, model.conv0), (self.head, merge), (self.last, last)):
            own.load(conv.weight, conv.bias, *kept)
        self.normalisation.load(norm, self.dtype)
        self.shifts.load_state_dict(model.shifts.state_dict())

    @torch.no_grad()
    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        return tuple(shift.to(self.dtype) for shift in self.shifts.of_time(times))

    @torch.no_grad()
    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        if self.n_cfeat == 0 or condition is None:
            return None
        if condition.shape[1:] != (self.n_cfeat,):
            raise ValueError(f"c: got shape {list(condition.shape)}, needs [{n}, {self.n_cfeat}]")
        both = torch.stack((condition, torch.zeros_like(condition))) if guided else condition[None]
        shifts = (shift.to(self.dtype) for shift in self.shifts.of_context(both))
        return tuple(shift.contiguous() if self.layout.kernels else shift for shift in shifts)

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows) -> Tensor:
        """As in `Form`. x may be wider than the network's type."""
        x = laid_out(x, self.dtype, self.layout)
        if not self.layout.shared and rows is not None:
            x, rows = torch.cat((x,) * halves(rows)), tuple(row.flatten(0, 1)[None] for row in rows)
        down, shifts = table_row[: self.depth], table_row[self.depth :]
        if rows is not None:
            shifts = tuple(map(self._told, shifts, rows))
        skips = [self.conv0(self._padded(x))]
        for block, shift in zip(self.downs, down, strict=True):
            skips.append(block(skips[-1], shift, then=POOL))
        x = self.middle(skips[-1], shifts[0])
        for upsampling, block, shift in zip(self.upsamplings, self.ups, shifts[1:], strict=True):
            x = block(upsampling(x, skips.pop()), shift.flatten(0, -2))
        shared = self.head.share(skips.pop())  # the widest features go here, where memory is at its peak
        return self._cropped(self.last(self.normalisation(self.head(x, shared))))

    # With kernels nothing but calls of them.

    def _told(self, shift: Tensor, row: Tensor) -> Tensor:
        """[1, C] of the time plus [k, n, C] of the condition."""
        if not self.layout.kernels:
            return shift + row
        return shifted(row.flatten(0, 1)[..., None, None], shift[None]).reshape(row.shape)

    def _padded(self, x: Tensor) -> Tensor:
        if not self.layout.kernels:
            return self.padding(x)
        (top, left), (bottom, right) = self.padding.before, self.padding.after
        return placed(x, (x.shape[2] + top + bottom, x.shape[3] + left + right), top, left)

    def _cropped(self, x: Tensor) -> Tensor:
        if not self.layout.kernels:
            return self.padding.cropped(x)
        top, left = self.padding.before
        return placed(x, self.padding.sides, -top, -left)


FORMS[SimpleUNet] = SimpleUNetForm
