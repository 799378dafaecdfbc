"""`ddpm import`: weights in, run folder out. Those of a ContextUnet or a SimpleUNet here."""

import warnings
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ddpm import runs
from ddpm.commands.importing_unet import FAMILY, image_sides, import_unet, other_library
from ddpm.commands.weight_files import places_of, read_versioned, say_left_out, shape_of, take_network
from ddpm.data import class_names
from ddpm.errors import BadInput, check_choice
from ddpm.networks import ContextUnet, SimpleUNet, load_context_unet_weights
from ddpm.schedule import NoiseSchedule
from ddpm.sizes import asked_sides, short, sides_of
from ddpm.solvers import given
from ddpm.table import PREDICTIONS

# Entries of every network of a kind: one that tells where in a file it lies, and statistics of a BatchNorm.
FIRST, STATISTICS = "init_conv.conv1.0.weight", "init_conv.conv1.1.running_mean"
SIMPLE_FIRST, SIMPLE_STATISTICS = "shifts.time.1.weight", "middle.conv1.1.running_mean"
LEVELS_MAX = 16  # of a network; at 16 its sides are multiples of 65,536 pixels
WEIGHTS = ("ema", "online")


def network_in(
    path: Path, entries: dict[str, Tensor], online: bool = False, first: str = FIRST, statistics: str = STATISTICS
) -> dict[str, Tensor]:
    """The state dict of the network in a file, bare of what training loops wrap it in. Raises BadInput."""
    places = places_of(first, entries)
    # Averages of parameters alone, and the optimiser's state, have no BatchNorm statistics.
    places = [place for place in places if place + statistics in entries] or places
    place, state = take_network(path, entries, places, online)
    say_left_out(path, place, entries)
    return state


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the ContextUnet that has these weights. Raises ValueError if there is none."""
    shape = partial(shape_of, state)
    down = "down{}.model.0.conv1.0.weight".format
    levels = next(level for level in count() if down(level + 1) not in state)
    if levels > LEVELS_MAX:
        raise ValueError(f"{levels} levels, at most {LEVELS_MAX} can be")
    n_feat, in_channels = shape(FIRST, 4)[:2]
    height, width = (side << levels for side in shape("up0.0.weight", 4)[2:])
    # An unconditional network has no embedding of a context.
    conditional = any(name.startswith("contextembed") for name in state)
    found = {"in_channels": in_channels, "n_feat": n_feat}
    found["n_cfeat"] = shape("contextembed1.model.0.weight", 2)[1] if conditional else 0
    found["height"] = height if height == width else [height, width]
    return found | {"multipliers": [shape(down(level + 1), 4)[0] // max(n_feat, 1) for level in range(levels)]}


def with_context(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network; embeddings of a context of no numbers become those of one number, with weight zero.

    With n_cfeat = 0 the original keeps them, and their biases scale the features; ours has none then.
    """
    names = [f"contextembed{level}.model.0.weight" for level in (1, 2)]
    empty = {name: state[name] for name in names if name in state and state[name].shape[1:] == (0,)}
    if empty:
        warnings.warn(
            "these weights have embeddings of a context of no numbers: now of one, without effect", stacklevel=2
        )
    return state | {name: tensor.new_zeros(len(tensor), 1) for name, tensor in empty.items()}


def simple_arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments, but the sides, of the SimpleUNet that has these weights. Raises ValueError if there is none."""
    shape = partial(shape_of, state)
    down = "downs.{}.conv1.0.weight".format
    levels = next(level for level in count() if down(level) not in state)
    n_feat, in_channels = shape("conv0.weight", 4)[:2]
    n_cfeat = shape("shifts.context.weight", 2)[1] if "shifts.context.weight" in state else 0
    found = {"in_channels": in_channels, "n_feat": n_feat, "n_cfeat": n_cfeat, "time_dim": shape(SIMPLE_FIRST, 2)[1]}
    return found | {"multipliers": [shape(down(level), 4)[0] // max(n_feat, 1) for level in range(levels)]}


def import_simple(
    weights: Path,
    entries: dict[str, Tensor],
    out: Path,
    *,
    online: bool,
    image_size: str | None,
    prediction: str | None,
    timesteps: int | None,
    beta_start: float | None,
    beta_end: float | None,
    classes: str | None,
    overwrite: bool,
) -> None:
    """Make a run of the SimpleUNet in a file, of a training loop with a linear schedule. Raises BadInput."""
    prediction = prediction or "eps"
    check_choice("--prediction", prediction, PREDICTIONS)
    if timesteps is None:
        raise BadInput(f"--timesteps: {weights} does not tell how many it was trained with, needs T")
    schedule = NoiseSchedule.make("linear", timesteps, beta_start, beta_end)
    sides = image_sides(image_size, weights)
    state = network_in(weights, entries, online, SIMPLE_FIRST, SIMPLE_STATISTICS)
    try:
        found = simple_arguments_of(state) | {"height": sides}
    except ValueError as error:
        raise BadInput(f"{weights}: not a SimpleUNet state dict ({error})") from None
    how = {"classes": classes, "sampling": {}, "overwrite": overwrite}
    write_run(weights, out, partial(SimpleUNet, **found), state, schedule, prediction, **how)


def write_run(
    weights: Path,
    out: Path,
    make: partial[ContextUnet | SimpleUNet],
    state: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    *,
    classes: str | None,
    sampling: Mapping[str, object],
    overwrite: bool,
) -> None:
    """Make the run of the network that has this state dict. Raises BadInput."""
    found = make.keywords
    names = () if classes is None else class_names(classes.split(","), "--classes")
    if names and len(names) != found["n_cfeat"]:
        raise BadInput(f"--classes: got {len(names)} names, needs {found['n_cfeat']}")
    with runs.held(out):
        runs.free_folder(out, overwrite)
        try:
            with torch.device("meta"):  # what the file claims costs no memory; it takes over the tensors themselves
                network = make()
            load_context_unet_weights(network, state)
        except (ValueError, RuntimeError, OverflowError) as error:  # sizes beyond what PyTorch counts
            raise BadInput(f"{weights}: {error}") from error
        more = {"classes": names, "weights": "imported", "sampling": sampling}
        runs.start_run(out, runs.make_config(network, schedule, prediction, **more), network)
    print(f"imported: {out} ({', '.join(f'{name} {value}' for name, value in found.items())})")
    print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")


def import_weights(
    weights: Annotated[Path, typer.Argument(help="a .pth, .pt, .ckpt or .safetensors, or a pipeline's folder")],
    out: Annotated[Path, typer.Option(help="run folder to make")],
    which: Annotated[str, typer.Option("--weights", help="of several: ema or online")] = "ema",
    n_feat: Annotated[int | None, typer.Option(help="[read off the weights]")] = None,
    n_cfeat: Annotated[int | None, typer.Option(help="[read off the weights]")] = None,
    height: Annotated[str | None, typer.Option(help="side, or HEIGHTxWIDTH [read off the weights]")] = None,
    timesteps: Annotated[int | None, typer.Option(help="T it was trained with [500]")] = None,
    beta_start: Annotated[float | None, typer.Option(help="first beta [1e-4]")] = None,
    beta_end: Annotated[float | None, typer.Option(help="last beta [0.02]")] = None,
    classes: Annotated[str | None, typer.Option(help="names of the classes, comma-separated")] = None,
    image_size: Annotated[str | None, typer.Option(help="of a Unet or SimpleUNet: side, or HEIGHTxWIDTH")] = None,
    prediction: Annotated[str | None, typer.Option(help="of those two: eps, v or x0 [its loss_weight; eps]")] = None,
    sampling_timesteps: Annotated[int | None, typer.Option(help="of a Unet: DDIM in so many [T, ancestral]")] = None,
    unet: Annotated[list[str] | None, typer.Option(help="of a Unet: NAME=VALUE, what weights do not tell")] = None,
    null_class: Annotated[int | None, typer.Option(help="of a pipeline: the class that means none [zeros]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
) -> None:
    """Turn published weights into a run that samples as their authors did.

    Those of a ContextUnet or SimpleUNet, or a checkpoint of denoising_diffusion_pytorch (Unet and GaussianDiffusion),
    or the folder of a DDPMPipeline or DDIMPipeline of diffusers.
    """
    check_choice("--weights", which, WEIGHTS)
    here = {"n_feat": n_feat, "n_cfeat": n_cfeat, "height": height, "timesteps": timesteps}
    here |= {"beta_start": beta_start, "beta_end": beta_end, "classes": classes}
    of_unet = {"image_size": image_size, "prediction": prediction, "sampling_timesteps": sampling_timesteps}
    of_unet |= {"unet": unet or None}
    if weights.is_dir():
        from ddpm.commands.importing_pipeline import import_pipeline

        asked = given(here | of_unet | {"weights": None if which == "ema" else which})
        import_pipeline(weights, out, asked, null_class=null_class, overwrite=overwrite)
        return
    if null_class is not None:
        raise BadInput(f"--null-class: got {null_class}, but {weights} is no folder of a pipeline, needs none")
    entries, version = read_versioned(weights)
    online = which == "online"
    if not places_of(FIRST, entries) and places_of(SIMPLE_FIRST, entries):
        for name in ("n_feat", "n_cfeat", "height"):
            of_unet[name] = here.pop(name)
        how = here | {name: of_unet.pop(name) for name in ("image_size", "prediction")}
        for name, value in given(of_unet).items():
            holds = "a SimpleUNet, which it is not for"
            raise BadInput(f"--{name.replace('_', '-')}: got {value}, but {weights} holds {holds}")
        import_simple(weights, entries, out, online=online, overwrite=overwrite, **how)
        return
    is_unet = not places_of(FIRST, entries)
    if is_unet and not places_of(FAMILY, entries):
        other = other_library(entries)
        looks = f"looks like {other}" if other else f"{len(entries)} tensors, none of them {FIRST} or {FAMILY}"
        raise BadInput(f"{weights}: not a ContextUnet state dict, nor of a Unet ({looks})")
    for name, value in given(here if is_unet else of_unet).items():
        holds = "a Unet, which it is not for" if is_unet else "no Unet, which it is for"
        raise BadInput(f"--{name.replace('_', '-')}: got {value}, but {weights} holds {holds}")
    if is_unet:
        import_unet(weights, entries, out, version=version, online=online, overwrite=overwrite, **of_unet)
        return
    state = with_context(network_in(weights, entries, online))
    try:
        found = arguments_of(state)
    except ValueError as error:
        raise BadInput(f"{weights}: not a ContextUnet state dict ({error})") from None
    size = None if height is None else short(asked_sides(height, "--height"))
    has = found | {"height": short(sides_of(found["height"]))}
    for name, asked in (("n_feat", n_feat), ("n_cfeat", n_cfeat), ("height", size)):
        if asked is not None and asked != has[name]:
            raise BadInput(f"--{name.replace('_', '-')}: got {asked}, but {weights} has {has[name]}")
    schedule = NoiseSchedule.make("context_unet", 500 if timesteps is None else timesteps, beta_start, beta_end)
    how = {"classes": classes, "sampling": {"variance": "beta"}, "overwrite": overwrite}
    write_run(weights, out, partial(ContextUnet, **found), state, schedule, "eps", **how)
