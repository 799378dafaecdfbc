"""Inference forms, one file per network that has one; the others are run by `PlainForm`.

`sample` asks before every call whether a module is what it was, so it has to be cheap (see `sampling/short` in the
benchmarks), and by the bytes: PyTorch's version counters miss writes through `.data`.
"""

import ctypes
import json
import logging
import os
import threading
from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ddpm.inference.context_unet import ContextUnetForm
from ddpm.inference.form import EXPORTED, FORMS, KERNELS, NATIVE, Form, Layout, PlainForm, at, device_of, halves
from ddpm.inference.inpaint import InpaintForm
from ddpm.inference.simple_unet import SimpleUNetForm
from ddpm.inference.unet import UnetForm
from ddpm.networks.inpaint import Inpaint
from ddpm.networks.protocol import build_network, name_of
from ddpm.precision import computed_in

logger = logging.getLogger("ddpm")

# What changes nothing in a forward pass in eval mode.
IRRELEVANT_SETTINGS = {"training", "momentum", "inplace"}
HOOKS = "_forward_hooks", "_forward_pre_hooks"
EVERYWHERE = nn.modules.module  # where PyTorch keeps the hooks of every module
_memcmp = ctypes.CDLL(None if os.name == "posix" else "msvcrt").memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes (sizes, modes, switches) of one module; `_...` are PyTorch's (torch.compile leaves one)."""
    names = [name for name in vars(module) if not name.startswith("_") and name not in IRRELEVANT_SETTINGS]
    return {name: value for name in names if isinstance(value := vars(module)[name], int | float | str | tuple | None)}


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


@cache
def _as_built(name: str, config: str) -> dict[str, tuple[Any, ...]]:
    """`_described` of a fresh network; config: its `config()` as JSON."""
    with torch.device("meta"):
        fresh = build_network(name, json.loads(config))
    return _described(fresh)


def _described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Class, settings and which parameters and buffers are None, of every module by path."""

    def absent(module: nn.Module) -> list[str]:
        return [name for name, tensor in (module._parameters | module._buffers).items() if tensor is None]

    return {path: (type(each), settings_of(each), absent(each)) for path, each in model.named_modules()}


def hooks_every_module() -> bool:
    """Whether a hook was registered for the forward of every module."""
    return bool(EVERYWHERE._global_forward_hooks or EVERYWHERE._global_forward_pre_hooks)


def has_form(model: nn.Module) -> bool:
    """Whether the model has a form of its own: a network as built, nothing exchanged, set otherwise or hooked."""
    hooks = (each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each) for each in model.modules())
    if type(model) not in FORMS or hooks_every_module() or any(hooks):
        return False
    if isinstance(model, Inpaint):  # as it is: what is in it may not be as built
        return has_form(model.network)
    return _described(model) == _as_built(name_of(model), json.dumps(model.config()))


def make_form(model: nn.Module, dtype: torch.dtype, layout: Layout | None = None) -> Form:
    """A form of its own with the model's present weights."""
    dtype = computed_in(dtype, device_of(model))
    if has_form(model):
        return FORMS[type(model)](model, dtype, layout)
    logger.info("nothing is folded: %s has no inference form (or is not as built)", type(model).__name__)
    return PlainForm(model, dtype, layout)


# Not of plain forms, which hold the network: as values they would keep their own key alive.
_kept: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, torch.device, Layout | None], tuple[Form, Snapshot]]]
_kept = WeakKeyDictionary()


def kept_form(model: nn.Module, dtype: torch.dtype, layout: Layout | None = None) -> Form:
    """The form that `sample` keeps with the model until `release`, with its present weights and what was compiled."""
    dtype = computed_in(dtype, device_of(model))
    key = dtype, device_of(model), layout
    forms = _kept.setdefault(model, {})
    for left in [other for other in forms if other[1] != key[1]]:
        del forms[left]
    if key in forms:
        form, snapshot = forms[key]
        if snapshot.same_settings() and snapshot.same_tensors():
            return form
        del forms[key]
        if has_form(model):
            form.refresh(model)
            forms[key] = form, Snapshot(model)
            return form
    form = make_form(model, dtype, layout)
    if not form.live:
        forms[key] = form, Snapshot(model)
    return form


def form_of(model: nn.Module) -> type[Form]:
    """The class of the form that it would be given."""
    if any(snapshot.same_settings() for _, snapshot in _kept.get(model, {}).values()):  # faster than to ask it anew
        return FORMS[type(model)]
    return FORMS[type(model)] if has_form(model) else PlainForm


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
# A thread that holds one does not follow into a forked process, where nobody would give it back.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)


def lock_of(model: nn.Module) -> threading.RLock:
    """Held by who samples the model: its mode, its kept form and what was captured of that are there once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, needs a torch.nn.Module")
    return _locks.setdefault(model, threading.RLock())


def release(model: nn.Module) -> None:
    """Forget what was kept to sample this network: folded weights, compiled code, CUDA graphs and their memory."""
    _kept.pop(model, None)
