"""Engines: ways to execute a step table. They share one interface and differ only in how they run a step.

An engine is built for a model and a table, Engine(model, timesteps, table, dtype), and called once per chunk:
engine(x_T, samples, context, guidance, noise, callback) -> x_0.
"""

import logging

import torch

from ddpm import inference
from ddpm.engines.compile import CompileEngine, compiler_missing
from ddpm.engines.eager import EagerEngine
from ddpm.engines.fused import FusedEngine
from ddpm.engines.graph import GraphEngine
from kernels import backend

logger = logging.getLogger("ddpm")

Engine = EagerEngine | FusedEngine
ENGINES: dict[str, type[Engine]] = {
    "eager": EagerEngine,
    "fused": FusedEngine,
    "compile": CompileEngine,
    "graph": GraphEngine,
}


def missing(name: str, device: torch.device, dtype: torch.dtype = torch.float32, own_noise: bool = False) -> str | None:
    """What an engine lacks to run here in a type, with a noise of the caller's own or with Philox; None if nothing."""
    if name == "graph" and device.type != "cuda":
        return f"a CUDA device, the model is on {device}"
    if name == "graph" and (own_noise or dtype == torch.float64):
        return "Philox noise and a state in float32, which its kernel draws and holds"
    if name != "eager" and device.type == "cuda" and dtype == torch.float64:
        return "another type than float64 on CUDA, which its kernels do not compute in: take eager"
    if name != "eager" and device.type == "cuda" and backend.triton is None:
        return "Triton, which is not installed"
    if name == "compile" and device.type == "cpu" and (lack := compiler_missing()) is not None:
        return lack
    if dtype == torch.float16 and device.type == "cpu" and not has_float16():
        return "a CPU with AVX512-FP16 for float16"
    return None


def choose(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, own_noise: bool = False
) -> type[Engine]:
    """The engine of this name; `auto` takes the fastest that needs no long warm-up and logs which, and why.

    Raises ValueError for an unknown name, RuntimeError for an engine or type that this machine cannot run.
    """
    if name == "auto":
        lacks = {engine: missing(engine, device, dtype, own_noise) for engine in ("graph", "fused", "eager")}
        name = next((engine for engine, lack in lacks.items() if lack is None), "eager")
        better = "; ".join(f"{engine} needs {lack}" for engine, lack in lacks.items() if lack is not None)
        logger.info("engine auto: %s on %s (%s)", name, device, better or "the fastest")
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, needs one of auto, {', '.join(ENGINES)}")
    lack = missing(name, device, dtype, own_noise)
    if lack is not None:
        raise RuntimeError(f"engine: {name!r} in {str(dtype).removeprefix('torch.')} needs {lack}")
    if dtype == torch.bfloat16:
        say_if_emulated(device, name)
    return ENGINES[name]


def has_float16() -> bool:
    """Whether oneDNN computes float16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def say_if_emulated(device: torch.device, name: str = "eager") -> None:
    """Log it where bfloat16 works and does not pay, and what an engine does about it."""
    if inference.computed_in(torch.bfloat16, device) != torch.bfloat16:
        instead = "slower than float32" if name == "eager" else f"engine {name} computes in float32, which is faster"
        logger.info("bfloat16 is emulated on this CPU (no AVX512-BF16, no AMX): %s", instead)
