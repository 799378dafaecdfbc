"""`ddpm import` of a folder: a pipeline of pixels that diffusers saved, its unet, its betas and how it samples.

A scheduler of DDPM or DDIM becomes the table that makes its steps; of the others the betas are taken, which is said.
What no table can do (thresholding, learned variances, ...) is refused by name. No file names a class that is imported.
"""

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm import runs
from ddpm.commands.weight_files import read_entries, take_network
from ddpm.data import class_names
from ddpm.errors import BadInput, check_integer, first_line
from ddpm.extras import need
from ddpm.files import read_json
from ddpm.networks.protocol import condition_shape, fit_state_dict, in_type, network_times
from ddpm.networks.unet2d import UNet2D
from ddpm.schedule import TIMESTEPS_MAX, NoiseSchedule

INDEX, UNET, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
LATENT = ("vae", "vqvae", "movq")
STEPS = {"ddpm": 1000, "ddim": 50, "dpmpp_2m": 25}  # diffusers' pipelines take as many; of the last untuned
# Of schedulers that no table of ours follows, but whose betas are a DDPM's.
OTHERS = {"DPMSolverMultistep": "dpmpp_2m"}
OTHERS |= dict.fromkeys(("PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"), "ddim")
OTHERS |= dict.fromkeys(("KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep", "UniPCMultistep"), "ddim")
OTHERS |= dict.fromkeys(("DPMSolverSinglestep", "DPMSolverSDE"), "ddim")
OF_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
# What diffusers called the layers of its attention before 0.15, in weights that are published.
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FORMER_NAME = re.compile(rf"(?<=\.)({'|'.join(FORMER)})(?=\.(weight|bias)$)")


def import_pipeline(
    folder: Path,
    out: Path,
    asked: Mapping[str, Any],
    *,
    null_class: int | None = None,
    overwrite: bool = False,
) -> None:
    """Make the run. asked: other options of the command line, of which pipelines take `classes` alone."""
    classes = class_names(asked["classes"].split(","), "--classes") if "classes" in asked else ()
    odd = next((name for name in asked if name != "classes"), None)
    if odd is not None:
        raise BadInput(f"--{odd.replace('_', '-')}: {folder} is a pipeline, which tells that itself, needs none")
    pipeline, scheduler = _components(folder)
    need("diffusers")
    network = _network(folder, null_class)
    of_unet, of_scheduler = _place(folder, "unet") / UNET, _place(folder, "scheduler") / SCHEDULER
    schedule, prediction, sampling = _sampling(of_scheduler, pipeline, scheduler)
    learned = network.arguments.get("num_train_timesteps") if not network.continuous_time else None
    if learned is not None and learned < schedule.timesteps:
        raise BadInput(f"{of_unet}: num_train_timesteps {learned}, its scheduler has {schedule.timesteps}")
    count = (condition_shape(network) or (0,))[0]
    if classes and len(classes) != count:
        raise BadInput(f"--classes: got {len(classes)} names, needs {count}")
    with runs.held(out):
        runs.free_folder(out, overwrite)
        more = {"classes": classes, "weights": "imported", "sampling": sampling}
        try:
            config = runs.make_config(network, schedule, prediction, **more)
        except ValueError as error:
            raise BadInput(f"{of_scheduler}: {error}") from error
        runs.start_run(out, config, network)
    shape = "x".join(map(str, network.sample_shape))
    conditions = f", conditions of {count} numbers" if count else ""
    steps = sampling["steps"] or schedule.timesteps
    print(f"imported: {out} ({shape}{conditions}, T = {schedule.timesteps}, {sampling['solver']}, {steps} steps)")
    print(f"sample it with: ddpm sample {out} --n 16 --out grid.png")


def _components(folder: Path) -> tuple[str, str]:
    """(class of the pipeline, class of its scheduler), if it is a unet of pixels and a scheduler. Raises BadInput."""
    if not (folder / INDEX).exists():
        raise BadInput(f"{folder}: has no {INDEX}, needs a folder that a pipeline of diffusers was saved to")
    index = read_json(folder / INDEX)
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    parts = {name: str(value[-1]) for name, value in pairs.items() if any(each is not None for each in value)}
    pipeline = str(index.get("_class_name"))[:80]
    needs = "needs a DDPMPipeline or DDIMPipeline of a UNet2DModel"
    latent = [name for name in LATENT if name in parts or (folder / name).is_dir()]
    latent += [name for name, kind in parts.items() if "Autoencoder" in kind or kind == "UNet2DConditionModel"]
    if latent:
        is_what = f"{latent[0]} is a {parts[latent[0]]}" if latent[0] in parts else f"has a folder {latent[0]}"
        raise BadInput(f"{folder}: latent: not a pixel model ({pipeline}: {is_what}), {needs}")
    other = next((name for name in parts if name not in ("unet", "scheduler")), None)
    if other is not None:
        raise BadInput(f"{folder}: {pipeline} has a {other} ({parts[other]}), {needs} and a scheduler alone")
    for name in ("unet", "scheduler"):
        if name not in parts:
            raise BadInput(f"{folder / INDEX}: {pipeline} has no {name}, {needs}")
    if parts["unet"] != "UNet2DModel":
        raise BadInput(f"{folder / INDEX}: its unet is a {parts['unet'][:80]}, {needs}")
    return pipeline, parts["scheduler"]


def _place(folder: Path, part: str) -> Path:
    """Where a part lies, as diffusers reads it: in its own folder, or, as google/ddpm-* of 2022, beside the index."""
    return folder / part if (folder / part).is_dir() else folder


def _known(config: Mapping[str, Any], kind: type, path: Path, *quiet: str) -> dict[str, Any]:
    """What a class of diffusers takes of a file's configuration; what it does not take is said."""
    names = inspect.signature(kind.__init__).parameters
    stated = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = [name for name in stated if name not in names and name not in quiet and stated[name] is not None]
    if unknown:
        warnings.warn(f"{path}: {kind.__name__} does not know {', '.join(unknown)}: left out", stacklevel=3)
    return {name: value for name, value in stated.items() if name in names}


def _network(folder: Path, null_class: int | None) -> UNet2D:
    """The unet with its weights. Raises BadInput."""
    from diffusers import UNet2DModel

    place = _place(folder, "unet")
    path, weights = place / UNET, _weights(place)
    arguments = _known(read_json(path), UNet2DModel, path)
    if arguments.get("dropout"):
        warnings.warn(f"{path}: dropout {arguments.pop('dropout')} is left out: sampling has none", stacklevel=2)
    try:
        with torch.device("meta"), torch.no_grad():  # what the file claims costs no memory
            network = UNet2D(null_class, **arguments).eval()
            x, t = torch.empty(1, *network.sample_shape), network_times(network, torch.ones(1, dtype=torch.int64), 1)
            network(x, in_type(t))
    except Exception as error:  # constructors raise nearly anything on what they were not made for
        name = "--null-class" if "null_class" in str(error) else path
        raise BadInput(f"{name}: {first_line(error)}") from error
    _, state = take_network(weights, read_entries(weights), [""], online=False)
    try:
        fit_state_dict(network, {f"unet.{_present_name(name)}": tensor for name, tensor in state.items()})
    except (ValueError, RuntimeError, MemoryError) as error:
        raise BadInput(f"{weights}: {str(error) or type(error).__name__} (the network is that of {path})") from error
    return network


def _present_name(name: str) -> str:
    return FORMER_NAME.sub(lambda found: FORMER[found[1]], name)


def _weights(folder: Path) -> Path:
    """The file of weights. Raises BadInput."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    found = sorted(path.name for path in folder.glob("*") if path.name != "config.json")
    raise BadInput(f"{folder}: has no {' or '.join(WEIGHTS)} (but {', '.join(found)[:200] or 'nothing'}), needs one")


def _sampling(path: Path, pipeline: str, scheduler: str) -> tuple[NoiseSchedule, str, dict[str, Any]]:
    """(schedule, prediction, sampling options) of a scheduler's configuration. Raises BadInput."""
    from ddpm.schedulers import PREDICTIONS, VARIANCES, FusedDDIMScheduler, FusedDDPMScheduler

    config = read_json(path)
    kind = scheduler.removesuffix("Scheduler").removeprefix("Fused").removesuffix("Parallel")
    kind = "DDIM" if pipeline == "DDIMPipeline" else kind  # which makes one of every scheduler
    if kind not in ("DDPM", "DDIM", *OTHERS):
        betas = "whose noise levels are no DDPM's betas"
        raise BadInput(f"{path}: {scheduler[:80]}, {betas}, needs DDPM, DDIM or one of {', '.join(OTHERS)} (Scheduler)")
    if config.get("predict_epsilon") is False:
        raise BadInput(f"{path}: predict_epsilon false, which diffusers reads no more, needs prediction_type 'sample'")
    made_by = FusedDDIMScheduler if kind == "DDIM" else FusedDDPMScheduler
    try:
        if kind in OTHERS:
            taken = {name: config[name] for name in (*OF_BETAS, "prediction_type") if name in config}
            taken["clip_sample"] = False
        else:
            quiet = ("predict_epsilon", *(("variance_type",) if kind == "DDIM" else ("set_alpha_to_one",)))
            taken = _known(config, made_by, path, *quiet)
        _check(taken)
        made = made_by(**taken)
        schedule = NoiseSchedule.from_alpha_bars([1.0, *made.alphas_cumprod.double().tolist()])
    except Exception as error:  # constructors raise nearly anything on what they were not made for
        raise BadInput(f"{path}: {first_line(error)}") from error
    get = made.config.get
    solver = OTHERS.get(kind, kind.lower())
    sampling: dict[str, Any] = {"solver": solver, "steps": min(STEPS[solver], schedule.timesteps)}
    if kind in OTHERS:
        how = f"the run samples by {solver} with {sampling['steps']} steps"
        warnings.warn(f"{path}: {scheduler} has no table here: its betas are taken, {how}", stacklevel=2)
    else:
        offset = get("steps_offset") if get("timestep_spacing") == "leading" else 0
        leading = get("timestep_spacing") == "leading"
        sampling["spacing"] = f"leading+{offset}" if leading else get("timestep_spacing")
        # With more it would begin after T, and in diffusers be an error.
        sampling["steps"] = min(sampling["steps"], schedule.timesteps // (offset + 1))
    if get("clip_sample"):
        sampling["clip"] = float(get("clip_sample_range"))
    if kind == "DDPM" and VARIANCES[get("variance_type")] == "beta":
        sampling["variance"] = "beta"
    if kind == "DDIM":
        sampling["ends"] = 0 if get("set_alpha_to_one") else 1
    if solver == "ddpm" and sampling["steps"] == schedule.timesteps:
        sampling["steps"] = None
    return schedule, PREDICTIONS[get("prediction_type")], sampling


def _check(taken: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the option, for what would cost memory, or be taken for something else."""
    timesteps, betas = taken.get("num_train_timesteps", 1000), taken.get("trained_betas")
    check_integer("num_train_timesteps", timesteps)
    if timesteps > TIMESTEPS_MAX:
        raise ValueError(f"num_train_timesteps: got {timesteps}, needs at most {TIMESTEPS_MAX}")
    if betas is not None and not (isinstance(betas, list) and len(betas) == timesteps):
        count = len(betas) if isinstance(betas, list) else repr(betas)[:80]
        raise ValueError(f"trained_betas: got {count}, needs a list of num_train_timesteps = {timesteps}")
    for name in ("clip_sample", "thresholding", "set_alpha_to_one", "rescale_betas_zero_snr"):
        if not isinstance(taken.get(name, False), bool):
            raise ValueError(f"{name}: got {taken[name]!r}, needs true or false")
    offset = taken.get("steps_offset", 0)
    check_integer("steps_offset", offset, 0)
    if offset >= timesteps:
        raise ValueError(f"steps_offset: got {offset}, needs less than num_train_timesteps = {timesteps}")
    if taken.get("timestep_spacing", "leading") not in ("leading", "trailing", "linspace"):
        raise ValueError(f"timestep_spacing: got {taken['timestep_spacing']!r}, needs leading, trailing or linspace")
    if not isinstance(taken.get("clip_sample_range", 1.0), int | float):
        raise ValueError(f"clip_sample_range: got {taken['clip_sample_range']!r}, needs a number")
