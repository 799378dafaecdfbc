"""Engines: ways to execute a step table. They share one interface and differ only in how they run a step.

An engine is built for a model and a table, Engine(model, timesteps, table, dtype), and called once per chunk:
engine(x_T, samples, context, guidance, noise, callback) -> x_0.
"""

import logging

import torch

from ddpm.engines.eager import EagerEngine

logger = logging.getLogger("ddpm")

ENGINES = {"eager": EagerEngine}
PLANNED = ("fused", "compile", "graph")


def choose(name: str, device: torch.device) -> type[EagerEngine]:
    """The engine of this name; `auto` takes the fastest that runs on the device and logs which.

    Raises ValueError for an unknown name, RuntimeError for an engine that is not available.
    """
    if name == "auto":
        logger.info("engine auto: eager on %s (the only engine so far)", device)
        return EagerEngine
    if name in PLANNED:
        raise RuntimeError(f"engine: {name!r} is not built yet, available: auto, {', '.join(ENGINES)}")
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, needs one of auto, {', '.join(ENGINES)}")
    return ENGINES[name]
