"""Whether a module is what it was: its settings, its tensors to the byte.

`sample` asks before every call, so it has to be cheap: PyTorch's version counters miss writes through `.data`, hence
the bytes. For the 158 tensors and 6 MB of a network with n_feat 64, 16x16: see `sampling/short` in the benchmarks.
"""

import ctypes
import sys
from collections.abc import Iterator
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

# What changes nothing in a forward pass in eval mode.
IRRELEVANT_SETTINGS = {"training", "momentum", "inplace"}
HOOKS = "_forward_hooks", "_forward_pre_hooks"
_memcmp = ctypes.CDLL(None).memcmp if sys.platform != "win32" else None
if _memcmp is not None:
    _memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes (sizes, modes, switches) of one module."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | None)
        and name not in IRRELEVANT_SETTINGS
        and not name.startswith("_")  # PyTorch's own books: torch.compile(model) leaves a mark
    }


class _Seen:
    """One module as it was. Holds it weakly: this must not keep a model alive."""

    def __init__(self, module: nn.Module) -> None:
        settings = settings_of(module)
        self.module, self.kind, self.count = ref(module), type(module), len(vars(module))
        self.read = itemgetter(*HOOKS, *settings)
        self.values = self.read({book: {} for book in HOOKS} | settings)
        self.children = tuple(map(id, module._modules.values()))

    def unchanged(self) -> bool:
        module = self.module()
        if type(module) is not self.kind:
            return False
        held = vars(module)
        if len(held) != self.count or tuple(map(id, held["_modules"].values())) != self.children:
            return False
        try:
            return self.read(held) == self.values
        except KeyError:
            return False


class Snapshot:
    """Of a model: `same_settings` and, after it, `same_tensors` tell whether it is still as it was."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.seen = [_Seen(module) for module in model.modules()]
        tensors = list(self._tensors())
        self.kinds = [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors]
        self.copies = [tensor.detach().clone() for tensor in tensors if tensor.is_cpu]
        elsewhere = [tensor for tensor in tensors if not tensor.is_cpu]
        self.flat = _Flat(elsewhere) if elsewhere else None

    def same_settings(self) -> bool:
        """Whether no module was exchanged, set otherwise, hooked or given another forward."""
        return all(seen.unchanged() for seen in self.seen)

    def _tensors(self) -> Iterator[Tensor]:
        for seen in self.seen:
            held = vars(seen.module())
            for tensors in (held["_parameters"], held["_buffers"]):
                for tensor in tensors.values():
                    if tensor is not None:
                        yield tensor

    @torch.no_grad()
    def same_tensors(self) -> bool:
        """Whether every tensor has the type, shape and bytes that it had; one synchronisation on CUDA."""
        tensors = list(self._tensors())
        if [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors] != self.kinds:
            return False
        here = (tensor for tensor in tensors if tensor.is_cpu)
        if not all(map(_same_bytes, here, self.copies)):
            return False
        return self.flat is None or self.flat.holds([tensor for tensor in tensors if not tensor.is_cpu])


class _Flat:
    """Tensors of a device, packed: gathered by few launches and compared by one."""

    ALIGNMENT = 16

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes = [-(-tensor.numel() * tensor.element_size() // self.ALIGNMENT) * self.ALIGNMENT for tensor in tensors]
        self.then = torch.zeros(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        self.now = torch.zeros_like(self.then)
        pieces = self.now.split(sizes)
        self.views = [
            piece[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]
        self._gather(tensors)
        self.then.copy_(self.now)

    def _gather(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(self.views, [tensor.detach() for tensor in tensors])

    def holds(self, tensors: list[Tensor]) -> bool:
        self._gather(tensors)
        return torch.equal(self.now, self.then)


def _same_bytes(tensor: Tensor, copy: Tensor) -> bool:
    if _memcmp is None or not (tensor.is_contiguous() and copy.is_contiguous()):
        return torch.equal(tensor, copy)
    return _memcmp(tensor.data_ptr(), copy.data_ptr(), tensor.numel() * tensor.element_size()) == 0
