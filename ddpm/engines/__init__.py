"""Engines: ways to execute a step table, one file each. This lists them and chooses one."""

import logging

import torch

from ddpm.engines.eager import EagerEngine  # the reference is listed first

# isort: split
from ddpm.engines.compile import CompileEngine
from ddpm.engines.engine import ENGINES, Engine, engine
from ddpm.engines.fused import FusedEngine
from ddpm.engines.graph import GraphEngine
from ddpm.errors import check_choice
from ddpm.precision import computed_in, has_float16

logger = logging.getLogger("ddpm")

# The fastest first, of those that need no long warm-up. A module without a form of its own is not captured unasked: it
# may read values on the host. On CPUs `fused` serves it too, by its noise drawn ahead: 1.3 to 3 times eager's speed for
# ddpm, 0.94 to 1.16 for ddim (two convolutions of 32 channels, 16x16, batch 1 to 32, one core of an EPYC with AVX2).
AUTOMATIC, AUTOMATIC_PLAIN = ("graph", "fused", "eager"), ("fused", "eager")


def unavailable_reason(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False
) -> str | None:
    """What an engine lacks to run here in a type, with a noise of the caller's own or with Philox; None if nothing."""
    lack = ENGINES[name].lacks(device, dtype, custom_noise)
    if lack is None and dtype == torch.float16 and device.type == "cpu" and not has_float16():
        return "a CPU with AVX512-FP16 for float16"
    return lack


def competitors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """The engines beside `eager` that this machine can run."""
    return [name for name in ENGINES if name != "eager" and unavailable_reason(name, device, dtype) is None]


def choose(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False, plain: bool = False
) -> type[Engine]:
    """The engine of this name; `auto` takes the fastest that needs no long warm-up and logs which, and why.

    plain: whether the network has no inference form of its own.
    Raises ValueError for an unknown name, RuntimeError for an engine or type that this machine cannot run.
    """
    if name == "auto":
        candidates = AUTOMATIC_PLAIN if plain else AUTOMATIC
        lacks = {known: unavailable_reason(known, device, dtype, custom_noise) for known in candidates}
        name = next((known for known, lack in lacks.items() if lack is None), "eager")
        better = "; ".join(f"{known} needs {lack}" for known, lack in lacks.items() if lack is not None)
        if plain and device.type == "cuda":
            better = "; ".join(filter(None, ("graph, where asked for: this network has no form of its own", better)))
        logger.info("engine auto: %s on %s (%s)", name, device, better or "the fastest")
    check_choice("engine", name, ("auto", *ENGINES))
    lack = unavailable_reason(name, device, dtype, custom_noise)
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
