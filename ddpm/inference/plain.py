"""The form of a network without one of its own: the network itself, called with t and c; guidance on twice the rows."""

import copy

import torch
from torch import Tensor, nn

from ddpm.inference.form import Form, Layout, Rows
from ddpm.networks.protocol import in_type, null_condition


def typed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy in another type and eval mode."""
    kind = next(model.parameters(), torch.empty(0, dtype=dtype)).dtype
    return model if kind == dtype else copy.deepcopy(model).to(dtype).eval()


def checked(m: Tensor, x: Tensor) -> Tensor:
    """A network's output. Raises TypeError or ValueError unless it is a tensor with the shape of x."""
    if not isinstance(m, Tensor):
        raise TypeError(f"model: returned a {type(m).__name__}, needs a tensor of the shape of x")
    if m.shape != x.shape:
        raise ValueError(f"model: returned {list(m.shape)}, needs the shape of x {list(x.shape)}")
    return m


class PlainForm(Form):
    """Follows the live module where that has the type; a copy in another type is renewed by `refresh`."""

    live = True

    def __init__(self, model: nn.Module, dtype: torch.dtype, layout: Layout | None = None) -> None:
        super().__init__(dtype)
        self.model = typed(model, dtype)

    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        return (in_type(times, self.dtype),)

    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        if condition is None:
            return None
        condition = condition.to(self.dtype)
        return (torch.stack((condition, null_condition(self.model, condition))) if guided else condition[None],)

    def refresh(self, model: nn.Module) -> None:
        self.model = typed(model, self.dtype)

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows) -> Tensor:
        x = x.to(self.dtype)
        condition = None
        if rows is not None:
            condition, copies = rows[0].flatten(0, 1), rows[0].shape[0]
            if torch.compiler.is_exporting():  # where the copies are not known before
                x = x.expand(copies, *x.shape).flatten(0, 1)
            elif copies > 1:
                x = torch.cat((x,) * copies)
        return checked(self.model(x, table_row[0].expand(x.shape[0]), condition), x)
