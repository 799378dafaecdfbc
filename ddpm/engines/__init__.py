"""Engines: ways to execute a step table, one file each. This lists them and chooses one."""

import logging

import torch

from ddpm.engines.eager import EagerEngine  # the reference is listed first

# isort: split
from ddpm.engines.compile import CompileEngine
from ddpm.engines.engine import ENGINES, Engine, engine
from ddpm.engines.fused import FusedEngine
from ddpm.engines.graph import GraphEngine
from ddpm.engines.native import NativeEngine
from ddpm.errors import check_choice
from ddpm.inference.form import Form, PlainForm
from ddpm.precision import computed_in, has_float16

logger = logging.getLogger("ddpm")

# The fastest first, of those that need no long warm-up. A module without a form of its own is not captured unasked: it
# may read values on the host. On CPUs `fused` serves it too, by its noise drawn ahead: 1.3 to 3 times eager's speed for
# ddpm, 0.94 to 1.16 for ddim (two convolutions of 32 channels, 16x16, batch 1 to 32, one core of an EPYC with AVX2).
AUTOMATIC = {"cuda": ("graph", "fused", "eager"), "cpu": ("native", "fused", "eager")}


def unavailable_reason(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    custom_noise: bool = False,
    form: type[Form] | None = None,
) -> str | None:
    """What an engine lacks to run here in a type, with a noise of the caller's own or with Philox; None if nothing.

    form: of the network that it is to run, if that is known.
    """
    kind = ENGINES[name]
    if kind.in_operators and form is not None and not form.in_operators:
        return "a network whose inference form is written in operators alone, see docs/engines.md"
    lack = kind.lacks(device, dtype, custom_noise)
    if lack is None and dtype == torch.float16 and device.type == "cpu" and not has_float16():
        return "a CPU with AVX512-FP16 for float16"
    return lack


def competitors(device: torch.device, dtype: torch.dtype = torch.float32, form: type[Form] | None = None) -> list[str]:
    """The engines beside `eager` that this machine can run, of a network with this form."""
    return [name for name in ENGINES if name != "eager" and unavailable_reason(name, device, dtype, form=form) is None]


def choose(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    custom_noise: bool = False,
    form: type[Form] | None = None,
) -> type[Engine]:
    """The engine of this name; `auto` takes the fastest that needs no long warm-up and logs which, and why.

    form: that the network has, see `form_of`.
    Raises ValueError for an unknown name, RuntimeError for an engine or type that this machine cannot run.
    """
    if name == "auto":
        reasons = []
        for name in AUTOMATIC.get(device.type, AUTOMATIC["cpu"]):
            if name == "graph" and form is PlainForm:
                reasons.append("graph, where asked for: this network has no form of its own")
                continue
            lack = unavailable_reason(name, device, dtype, custom_noise, form)
            if lack is None:
                break
            reasons.append(f"{name} needs {lack}")
        logger.info("engine auto: %s on %s (%s)", name, device, "; ".join(reasons) or "the fastest")
    check_choice("engine", name, ("auto", *ENGINES))
    lack = unavailable_reason(name, device, dtype, custom_noise, form)
    if lack is not None:
        raise RuntimeError(f"engine: {name!r} in {str(dtype).removeprefix('torch.')} needs {lack}")
    if dtype == torch.bfloat16:
        log_if_emulated(device, name)
    return ENGINES[name]


def log_if_emulated(device: torch.device, name: str = "eager") -> None:
    """Log the reason where bfloat16 is slower than float32, and what an engine does about it."""
    if computed_in(torch.bfloat16, device) != torch.bfloat16:
        instead = "slower than float32" if name == "eager" else f"engine {name} computes in float32, which is faster"
        logger.info("bfloat16 is emulated on this CPU (no AVX512-BF16, no AMX): %s", instead)
