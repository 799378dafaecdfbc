"""fused-ddpm: train a pixel diffusion network, then sample it as fast as the hardware allows."""

from contextlib import suppress
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.editing import edit
    from ddpm.gaussian_diffusion import GaussianDiffusion
    from ddpm.networks import ContextUnet, PointMLP, SimpleUNet, Unet, load_context_unet_weights
    from ddpm.runs import Run, load_run
    from ddpm.sampling import sample
    from ddpm.schedule import NoiseSchedule
    from ddpm.solvers import make_table
    from ddpm.table import StepTable
    from ddpm.trainer import Trainer
    from ddpm.trajectory import Trajectory

with suppress(metadata.PackageNotFoundError):  # Hugging Face's, of the name of our folder
    metadata.distribution("kernels")
    import_module("kernels")  # which says what is wrong

# Imported when asked for: whoever needs one part, as the benchmarks of another project do, does not wait for all.
_HOMES = {
    "ContextUnet": "ddpm.networks",
    "GaussianDiffusion": "ddpm.gaussian_diffusion",
    "NoiseSchedule": "ddpm.schedule",
    "PointMLP": "ddpm.networks",
    "Run": "ddpm.runs",
    "SimpleUNet": "ddpm.networks",
    "StepTable": "ddpm.table",
    "Trainer": "ddpm.trainer",
    "Trajectory": "ddpm.trajectory",
    "Unet": "ddpm.networks",
    "edit": "ddpm.editing",
    "load_context_unet_weights": "ddpm.networks",
    "load_run": "ddpm.runs",
    "make_table": "ddpm.solvers",
    "sample": "ddpm.sampling",
}

__all__ = [
    "ContextUnet",
    "GaussianDiffusion",
    "NoiseSchedule",
    "PointMLP",
    "Run",
    "SimpleUNet",
    "StepTable",
    "Trainer",
    "Trajectory",
    "Unet",
    "edit",
    "load_context_unet_weights",
    "load_run",
    "make_table",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
