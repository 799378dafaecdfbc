"""Runs as pipelines of diffusers: a DDPMPipeline's folder that `from_pretrained` loads.

A run of `unet2d` leaves diffusers' own classes alone. Any other network of pictures is a `RunModel` beside one of our
schedulers; diffusers imports no module because a file names it, so whoever loads that imports this one first.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, ModelMixin, __version__  # mixins: see ddpm.schedulers
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ddpm.errors import BadInput
from ddpm.files import json_text, replacing_all, tensor_bytes
from ddpm.networks.protocol import build_network, in_type, name_of, network_times, recalls, sample_shape
from ddpm.networks.unet2d import UNet2D
from ddpm.runs import FILES, Run, held
from ddpm.schedulers import PREDICTIONS, FusedDDIMScheduler, FusedDDPMScheduler
from ddpm.solvers import OFFSET

INDEX, UNET, WEIGHTS = "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
WRITTEN = (INDEX, UNET, WEIGHTS, SCHEDULER)
STALE = ("unet/diffusion_pytorch_model.bin", f"{WEIGHTS}.index.json", "unet/diffusion_pytorch_model.bin.index.json")
SPACINGS = ("trailing", "leading", "linspace")


class RunModel(ModelMixin, ConfigMixin):
    """A network of ours as diffusers calls it: model(sample [n, C, H, W], timestep from 0).sample.

    name, arguments: see `ddpm.networks.protocol.build_network`. timesteps: T of its schedule. The other arguments
    are what pipelines read.
    """

    @register_to_config
    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        timesteps: int,
        in_channels: int,
        sample_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.network = build_network(name, arguments)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """timestep: one, or one a row. class_labels: conditions [n, *condition_shape], or None."""
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample)) + 1
        time = in_type(network_times(self.network, t, self.config.timesteps), sample.dtype)
        m = self.network(sample, time, class_labels)
        return UNet2DOutput(sample=m) if return_dict else (m,)


def scheduler_of(run: Run, plain: bool) -> tuple[Any, list[str]]:
    """(the scheduler that makes the run's steps: diffusers' own or ours, what of its sampling it does not follow)."""
    sampling, schedule, left = run.sampling, run.schedule, []
    solver, spacing = sampling["solver"], sampling.get("spacing") or "trailing"
    offset = OFFSET.fullmatch(spacing)
    if solver not in ("ddpm", "ddim"):
        left.append(f"solver {solver} (ddpm takes its place)")
    if not offset and spacing not in SPACINGS:
        left.append(f"spacing {spacing} (trailing takes its place)")
        spacing = "trailing"
    strides = solver == "ddim" and sampling.get("ends") is None
    if strides and (spacing == "linspace" or schedule.timesteps % (sampling["steps"] or 1)):
        left.append("steps to the next timestep (its DDIM goes from t to t - T // S)")
    left += [f"{name} {sampling[name]} (an argument of its step)" for name in ("eta", "rederive") if sampling.get(name)]
    bars = schedule.alpha_bars
    options = {
        "num_train_timesteps": schedule.timesteps,
        "trained_betas": (1 - bars[1:] / bars[:-1]).tolist(),  # of every kind, also those that begin below 1
        "prediction_type": next(name for name, own in PREDICTIONS.items() if own == run.config["prediction"]),
        "clip_sample": bool(sampling.get("clip")),
        "clip_sample_range": sampling.get("clip") or 1.0,
        "timestep_spacing": "leading" if offset else spacing,
        "steps_offset": int(offset[1]) if offset else 0,
    }
    if solver == "ddim":
        return (DDIMScheduler if plain else FusedDDIMScheduler)(
            **options, set_alpha_to_one=sampling.get("ends") != 1
        ), left
    variance = "fixed_large" if sampling.get("variance") == "beta" else "fixed_small"
    return (DDPMScheduler if plain else FusedDDPMScheduler)(**options, variance_type=variance), left


def _unet_of(run: Run) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a model whose configuration is written, the weights). Raises BadInput for what is no picture."""
    model = run.model
    if isinstance(model, UNet2D):
        return model.unet, model.unet.state_dict()
    shape = sample_shape(model)
    if recalls(model):
        raise BadInput(f"{run.folder}: its network reads its own estimate, which diffusers' pipelines do not keep")
    if len(shape) != 3:
        raise BadInput(f"{run.folder}: has samples of shape {list(shape)}, diffusers' pipelines need images")
    timesteps = run.schedule.timesteps
    with torch.device("meta"):
        made = RunModel(name_of(model), model.config(), timesteps, in_channels=shape[0], sample_size=shape[1:])
    return made, {f"network.{name}": tensor for name, tensor in model.state_dict().items()}


def _named(part: Any) -> list[str]:
    module = type(part).__module__
    return [module if module.partition(".")[0] == "ddpm" else "diffusers", type(part).__name__]


def write_pipeline(run: Run, folder: Path, overwrite: bool = False) -> list[str]:
    """Write the run as a pipeline's folder, whole or not at all; returns what of its sampling is left out.

    Raises BadInput for a folder that holds a run, or a pipeline unless overwrite.
    """
    unet, state = _unet_of(run)
    scheduler, left = scheduler_of(run, plain=isinstance(run.model, UNet2D))
    pipeline = "DDIMPipeline" if type(scheduler) is DDIMScheduler else "DDPMPipeline"  # which makes ours one of those
    index = {"_class_name": pipeline, "_diffusers_version": __version__}
    index |= {"scheduler": _named(scheduler), "unet": _named(unet)}
    texts = {INDEX: json_text(index), UNET: unet.to_json_string(), SCHEDULER: scheduler.to_json_string()}
    contents = {name: text.encode() for name, text in texts.items()} | {WEIGHTS: tensor_bytes(state)}
    with held(folder):
        found = [name for name in (*FILES, *WRITTEN, *STALE) if (folder / name).exists()]
        if found and found[0] in FILES:
            raise BadInput(f"{folder}: holds a run ({found[0]}), needs another folder for the pipeline")
        if found and not overwrite:
            raise BadInput(f"{folder}: already holds a pipeline ({found[0]}), needs --overwrite or another folder")
        with held(folder / "unet"), held(folder / "scheduler"):
            stale = [folder / name for name in STALE]
            with replacing_all([folder / name for name in WRITTEN], stale) as partials:
                for partial, name in zip(partials, WRITTEN, strict=True):
                    partial.write_bytes(contents[name])
    return left
