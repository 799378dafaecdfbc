"""Inference forms, one file per network that has one; the others are run by `PlainForm`."""

import json
import logging
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ddpm.inference.context_unet import ContextUnetForm
from ddpm.inference.form import (
    EXPORTED,
    FORMS,
    KERNELS,
    Form,
    Layout,
    PlainForm,
    at,
    device_of,
    form_dtype,
    form_of,
    halves,
)
from ddpm.inference.freshness import Snapshot, settings_of
from ddpm.networks.protocol import build_network, name_of

logger = logging.getLogger("ddpm")


@cache
def _as_built(name: str, config: str) -> dict[str, tuple[type, dict[str, object], tuple[str, ...]]]:
    """`_described` of a fresh network; config: its `config()` as JSON."""
    with torch.device("meta"):
        fresh = build_network(name, json.loads(config))
    return _described(fresh)


def _described(model: nn.Module) -> dict[str, tuple[type, dict[str, object], tuple[str, ...]]]:
    """Class, settings and which parameters and buffers are None, of every module by path."""
    return {
        path: (
            type(module),
            settings_of(module),
            tuple(name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is None),
        )
        for path, module in model.named_modules()
    }


def has_form(model: nn.Module) -> bool:
    """Whether the model has a form of its own: a network as built, nothing exchanged, set otherwise or hooked."""
    if type(model) not in FORMS:
        return False
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
    if hooked:
        return False
    return _described(model) == _as_built(name_of(model), json.dumps(model.config()))


def make_form(model: nn.Module, dtype: torch.dtype, layout: Layout | None = None) -> Form:
    """A form of its own with the model's present weights."""
    dtype = form_dtype(model, dtype)
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
    key = form_dtype(model, dtype), device_of(model)
    forms = _kept.setdefault(model, {})
    for left in [other for other in forms if other[1] != key[1]]:
        del forms[left]
    if key in forms:
        form, snapshot = forms[key]
        if not (snapshot.same_settings() and snapshot.same_tensors()):
            if not has_form(model):
                del forms[key]
                return make_form(model, dtype)
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
