"""Whether a module is what it was: its settings, its tensors to the byte.

`sample` asks before every call, so it has to be cheap: PyTorch's version counters miss writes through `.data`, hence
the bytes. For the 158 tensors and 6 MB of a network with n_feat 64, 16x16: see `sampling/short` in the benchmarks.
"""

import ctypes
from collections.abc import Sequence
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

# What changes nothing in a forward pass in eval mode.
IRRELEVANT_SETTINGS = {"training", "momentum", "inplace"}
HOOKS = "_forward_hooks", "_forward_pre_hooks"
_memcmp = ctypes.CDLL(None).memcmp
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

    def __init__(self, model: nn.Module) -> None:
        self.seen = [_Seen(module) for module in model.modules()]
        tensors = self._tensors()
        self.kinds = [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors]
        self.copies = [tensor.detach().clone() for tensor in tensors if tensor.is_cpu]
        self.packed = _packed(tensors)

    def same_settings(self) -> bool:
        """Whether no module was exchanged, set otherwise, hooked or given another forward."""
        return all(seen.unchanged() for seen in self.seen)

    def _tensors(self) -> list[Tensor]:
        held = [vars(seen.module()) for seen in self.seen]
        books = [book for own in held for book in (own["_parameters"], own["_buffers"])]
        return [tensor for book in books for tensor in book.values() if tensor is not None]

    def same_tensors(self) -> bool:
        """Whether every tensor has the type, shape and bytes that it had; one synchronisation on CUDA."""
        tensors = self._tensors()
        if [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors] != self.kinds:
            return False
        here = (tensor for tensor in tensors if tensor.is_cpu)
        if not all(map(_same_bytes, here, self.copies)):
            return False
        return self.packed is None or torch.equal(_packed(tensors), self.packed)


def _packed(tensors: Sequence[Tensor]) -> Tensor | None:
    """The bytes of those on a device, gathered by few launches to be compared by one; None where there are none."""
    parts = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors if not tensor.is_cpu]
    return torch.cat(parts) if parts else None


def _same_bytes(tensor: Tensor, copy: Tensor) -> bool:
    if not (tensor.is_contiguous() and copy.is_contiguous()):
        return torch.equal(tensor, copy)
    return _memcmp(tensor.data_ptr(), copy.data_ptr(), tensor.numel() * tensor.element_size()) == 0
