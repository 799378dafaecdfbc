"""A form: a network as sampling runs it, written once as calls of the operators in `kernels/`.

    tables(times)                what depends on the step alone, each [S, ...]
    rows(condition, n, guided)   what depends on the condition alone, each [k, n, ...]; None without a condition
    forward(x, table_row, rows)  m [k * n, ...] for x [n, ...]; table_row: each table's row [1, ...]
    refresh(model)               take over the model's present weights

k is 2 under guidance (conditional half first), else 1: how halves share work is the form's business alone. Engines run
the one text, the export traces it, the profile names its modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddpm.precision import computed_in

Rows = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Layout:
    """How a form keeps its weights and features.

    channels_last: the memory layout of features. shared: whether guidance shares what its halves have in common; False
    repeats it, for comparison. pack: weights in oneDNN's layout on CPUs. winograd: 3x3 convolutions by that operator on
    CPUs. kernels: every convolution with what follows it by one Triton kernel of ours.
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


class Form(nn.Module):
    """The base of forms. live: whether it runs the module itself, in the mode and with the weights that this has."""

    live: ClassVar[bool] = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def tables(self, times: Tensor) -> tuple[Tensor, ...]:
        """times: [S], what `network_times` gives."""
        raise NotImplementedError

    def rows(self, condition: Tensor | None, n: int, guided: bool) -> Rows:
        """condition: float [n, *condition_shape] or None."""
        raise NotImplementedError

    def refresh(self, model: nn.Module) -> None:
        """In place, where they have room: compiled code and captured graphs go on."""


FORMS: dict[type[nn.Module], type[Form]] = {}


def form_of(network: type[nn.Module]) -> Callable[[type[Form]], type[Form]]:
    """Register the form of a network's class."""

    def register(kind: type[Form]) -> type[Form]:
        FORMS[network] = kind
        return kind

    return register


def at(tables: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    """The tables' rows [1, ...] at an index int64 [1], which may live on a device."""
    return tuple(table.index_select(0, index) for table in tables)


def halves(rows: Rows) -> int:
    """2 under guidance, else 1."""
    return 1 if rows is None else rows[0].shape[0]


def form_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What a form of this model computes in where `dtype` is asked for."""
    return computed_in(dtype, device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters (or buffers) are; the CPU without any."""
    tensor = next(model.parameters(), None)
    tensor = next(model.buffers(), torch.empty(0)) if tensor is None else tensor
    return tensor.device
