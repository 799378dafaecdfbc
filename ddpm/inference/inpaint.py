"""The form of an Inpaint: that of the network in it; known pixels depend on tables of their own and on x."""

import copy

import torch
from torch import Tensor

from ddpm.inference.form import FORMS, Form, Layout, Rows, halves
from ddpm.networks.inpaint import Inpaint


class InpaintForm(Form):
    """Known pixels are computed in the state's type, whatever the network computes in."""

    def __init__(self, model: Inpaint, dtype: torch.dtype, layout: Layout | None = None) -> None:
        from ddpm.inference import make_form  # which knows this form

        super().__init__(dtype)
        self.network, self.given = make_form(model.network, dtype, layout), copy.deepcopy(model.given)

    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        return (*self.network.tables(times), *self.given.factors(times))

    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        return self.network.rows(condition, n, guided)

    def refresh(self, model: Inpaint) -> None:
        self.network.refresh(model.network)
        for name, buffer in self.given.named_buffers():
            buffer.copy_(getattr(model.given, name))

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows, *recalled: Tensor) -> Tensor:
        *own, of_x, of_known = table_row
        m = self.network(x, tuple(own), rows, *recalled)
        return self.given(m.reshape(halves(rows), *x.shape), x, of_x, of_known).flatten(0, 1)


FORMS[Inpaint] = InpaintForm
