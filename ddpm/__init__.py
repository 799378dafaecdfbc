"""fused-ddpm: train a ContextUnet diffusion model, then sample it as fast as the hardware allows."""

from ddpm.networks import ContextUnet, PointMLP, load_context_unet_weights
from ddpm.runs import Run, load_run
from ddpm.sampling import sample
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import StepTable, make_table

__all__ = [
    "ContextUnet",
    "NoiseSchedule",
    "PointMLP",
    "Run",
    "StepTable",
    "load_context_unet_weights",
    "load_run",
    "make_table",
    "sample",
]
