"""fused-ddpm: train a pixel diffusion network, then sample it as fast as the hardware allows."""

from ddpm.networks import ContextUnet, PointMLP, load_context_unet_weights
from ddpm.runs import Run, load_run
from ddpm.sampling import sample
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import make_table
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory
