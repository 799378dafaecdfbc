"""Inference forms, one file per network that has one; the others are run by `PlainForm`."""

import json
import logging
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ddpm.inference.context_unet import ContextUnetForm
from ddpm.inference.form import EXPORTED, FORMS, KERNELS, Form, Layout, PlainForm, at, device_of, form_of, halves
from ddpm.inference.freshness import Snapshot, settings_of
from ddpm.networks.protocol import build_network, name_of
from ddpm.precision import computed_in

logger = logging.getLogger("ddpm")


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


def has_form(model: nn.Module) -> bool:
    """Whether the model has a form of its own: a network as built, nothing exchanged, set otherwise or hooked."""
    if type(model) not in FORMS or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    ):
        return False
    return _described(model) == _as_built(name_of(model), json.dumps(model.config()))


def make_form(model: nn.Module, dtype: torch.dtype, layout: Layout | None = None) -> Form:
    """A form of its own with the model's present weights."""
    dtype = computed_in(dtype, device_of(model))
    if has_form(model):
        return FORMS[type(model)](model, dtype, layout)
    logger.info("nothing is folded: %s has no inference form (or is not as built)", type(model).__name__)
    return PlainForm(model, dtype, layout)


# Not of plain forms, which hold the network: as values they would keep their own key alive.
_kept: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, torch.device], tuple[Form, Snapshot]]]
_kept = WeakKeyDictionary()


def kept_form(model: nn.Module, dtype: torch.dtype) -> Form:
    """The form that `sample` keeps with the model, with the model's present weights: what was compiled is not lost.

    Only those of the device that the model is on, and until `release`.
    """
    dtype = computed_in(dtype, device_of(model))
    key = dtype, device_of(model)
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
    form = make_form(model, dtype)
    if not form.live:
        forms[key] = form, Snapshot(model)
    return form


def release(model: nn.Module) -> None:
    """Forget what was kept to sample this network: folded weights, compiled code, CUDA graphs and their memory."""
    _kept.pop(model, None)
