"""The form of a Unet: the network itself, but that

what depends on time alone is a table for each residual block, with the gain of its normalisation in it, and
its convolutions keep their weights as whoever runs them reads them fastest, see `Layout`.
"""

import copy

import torch
from torch import Tensor, nn

from ddpm.inference.convolutions import Convolution
from ddpm.inference.form import FORMS, Form, Layout, Rows, checked
from ddpm.networks.unet import Unet
from ddpm.networks.unet_versions import StandardizedConv2d


class UnetForm(Form):
    """forward(x, table_row, None[, x0_previous]) -> m [n, C, H, W] for x [n, C, H, W], computed in dtype."""

    def __init__(self, model: Unet, dtype: torch.dtype, layout: Layout | None = None) -> None:
        super().__init__(dtype)
        self.layout = layout or Layout()
        self.network = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
        for parent in list(self.network.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d) and child.kernel_size[0] <= 3:  # what the operator takes
                    setattr(parent, name, Convolution())
                elif isinstance(child, nn.Linear):  # of the time, which is embedded once
                    child.to(torch.promote_types(dtype, torch.float32))
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: Unet) -> None:
        """Take over the model's present weights. Shapes stay, so what compiled this form serves on."""
        for path, own in self.network.named_modules():
            source = model.get_submodule(path)
            if isinstance(own, Convolution):
                is_raw = isinstance(source, StandardizedConv2d)
                own.load(source.standardized() if is_raw else source.weight, source.bias, self.dtype, self.layout)
            for name, parameter in own.named_parameters(recurse=False):
                parameter.copy_(getattr(source, name))

    @torch.no_grad()
    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        return tuple(film.to(self.dtype) for film in self.network.films(times))

    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        return None

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows, *recalled: Tensor) -> Tensor:
        """As in `Form`. x may be wider than the network's type."""
        how = {"dtype": self.dtype, "memory_format": self.layout.memory_format}
        x, *recalled = [each.to(**how) for each in (x, *recalled)]
        return checked(self.network.denoise(x, table_row, *recalled), x)


FORMS[Unet] = UnetForm
