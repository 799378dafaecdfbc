"""A form: a network as sampling runs it, written once as calls of the operators in `kernels/`.

    tables(times)                what depends on the step alone, each [S, ...]; times [S]: what `network_times` gives
    rows(condition, n, guided)   what depends on the condition alone, each [k, n, ...]; condition [n, ...] or None
    forward(x, table_row, rows)  m [k * n, ...] for x [n, ...]; table_row: each table's row [1, ...]. A fourth argument,
                                 x0_previous [n, ...], only of a network with self_condition
    refresh(model)               take over the model's present weights, in place where they have room: compiled code and
                                 captured graphs go on

k is 2 under guidance (conditional half first), else 1: how halves share work is the form's business alone. Engines run
the one text, the export traces it, the profile names its modules.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddpm.networks.protocol import in_type, null_condition, predict

Rows = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Layout:
    """How a form keeps its weights and features.

    channels_last: the memory layout of features. shared: whether guidance shares what its halves have in common. pack:
    weights on CPUs as who convolves reads them fastest: oneDNN, or the kernels. winograd: 3x3 convolutions by that
    operator on CPUs. kernels: every convolution with what follows it by one kernel of ours.
    """

    channels_last: bool = True
    shared: bool = True
    pack: bool = True
    winograd: bool = True
    kernels: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


# What exporters take: plain operators.
EXPORTED = Layout(channels_last=False, pack=False, winograd=False)
# One launch a convolution. Whether that is faster than the library's, and for which batch, is not measured yet: no
# engine takes it by itself, `ddpm-bench gpu` measures it.
KERNELS = Layout(pack=False, winograd=False, kernels=True)
# The same in C++ on CPUs: of float32, where there is a compiler.
NATIVE = Layout(winograd=False, kernels=True)


class Form(nn.Module):
    """The base of forms.

    live: whether it runs the module itself, in the mode and with the weights that this has. in_operators: whether
    forward is calls of operators of `kernels/` and views alone, under Layout.kernels: what engine `native` records.
    """

    live: ClassVar[bool] = False
    in_operators: ClassVar[bool] = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype


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
    """Of a network without a form: the live module, or a copy in another type; guidance on twice the rows."""

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

    def forward(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows, *recalled: Tensor) -> Tensor:
        condition = None if rows is None else rows[0].flatten(0, 1)
        x, *recalled = [self._repeated(each.to(self.dtype), rows) for each in (x, *recalled)]
        return checked(predict(self.model, x, table_row[0].expand(x.shape[0]), condition, *recalled), x)

    def _repeated(self, x: Tensor, rows: Rows) -> Tensor:
        """Once for each half."""
        copies = halves(rows)
        if rows is not None and torch.compiler.is_exporting():  # where the copies are not known before
            return x.expand(copies, *x.shape).flatten(0, 1)
        return torch.cat((x,) * copies) if copies > 1 else x


FORMS: dict[type[nn.Module], type[Form]] = {}  # by the network's class


def at(tables: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    """The tables' rows [1, ...] at an index int64 [1], which may live on a device."""
    return tuple(table.index_select(0, index) for table in tables)


def laid_out(x: Tensor, dtype: torch.dtype, layout: Layout) -> Tensor:
    """x as a form computes it. Kernels read images of one channel as they lie, which `to` copies to other strides."""
    if layout.kernels and x.dtype == dtype and x.is_contiguous(memory_format=layout.memory_format):
        return x
    return x.to(dtype, memory_format=layout.memory_format)


def halves(rows: Rows) -> int:
    """2 under guidance, else 1."""
    return 1 if rows is None else rows[0].shape[0]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters (or buffers) are; the CPU without any."""
    tensor = next(model.parameters(), None)
    tensor = next(model.buffers(), torch.empty(0, device="cpu")) if tensor is None else tensor
    return tensor.device
