"""`ddpm import`: published ContextUnet weights in, run folder out."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated

import torch
import typer
from torch import Tensor

from ddpm import runs
from ddpm.data import check_class_names
from ddpm.errors import BadInput
from ddpm.networks import ContextUnet, load_context_unet_weights
from ddpm.schedule import NoiseSchedule


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth, never unpickling objects. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers of old formats raise nearly anything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "damaged, or with pickled objects" if isinstance(error, UnpicklingError) else reason
        raise BadInput(f"{path}: not a PyTorch file of weights alone ({reason})") from error
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
        raise BadInput(f"{path}: holds a {type(state).__name__}, needs a state dict of tensors")
    return state


def import_weights(
    weights: Annotated[Path, typer.Argument(help="a ContextUnet state dict, .pth")],
    out: Annotated[Path, typer.Option(help="run folder to make")],
    n_feat: Annotated[int | None, typer.Option(help="[read off the weights]")] = None,
    n_cfeat: Annotated[int | None, typer.Option(help="[read off the weights]")] = None,
    height: Annotated[int | None, typer.Option(help="[read off the weights]")] = None,
    timesteps: Annotated[int, typer.Option(help="T it was trained with")] = 500,
    beta_start: Annotated[float, typer.Option(help="first beta")] = 1e-4,
    beta_end: Annotated[float, typer.Option(help="last beta")] = 0.02,
    classes: Annotated[str | None, typer.Option(help="names of the classes, comma-separated")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
) -> None:
    """Turn published ContextUnet weights into a run that samples as their authors did: ddpm, variance beta, no clip."""
    state = read_state_dict(weights)
    levels = sum(1 for name in state if name.startswith("down") and name.endswith("model.0.conv1.0.weight"))
    try:
        rows, columns = state["up0.0.weight"].shape[2:]
        first = state["init_conv.conv1.0.weight"]
        sides = [rows << levels, columns << levels]
        # An unconditional network has no embedding of a context.
        conditional = any(name.startswith("contextembed") for name in state)
        n_context = state["contextembed1.model.0.weight"].shape[1] if conditional else 0
        found = {"in_channels": first.shape[1], "n_feat": first.shape[0], "n_cfeat": n_context}
        found["height"] = sides[0] if len(set(sides)) == 1 else sides
    except (KeyError, IndexError, ValueError) as error:
        raise BadInput(f"{weights}: not a ContextUnet state dict (no usable {error})") from None
    for name, asked in (("n_feat", n_feat), ("n_cfeat", n_cfeat), ("height", height)):
        if asked is not None and asked != found[name]:
            raise BadInput(f"--{name.replace('_', '-')}: got {asked}, but {weights} has {found[name]}")
    names = () if classes is None else tuple(classes.split(","))
    if names and len(names) != found["n_cfeat"]:
        raise BadInput(f"--classes: got {len(names)} names, needs {found['n_cfeat']}")
    check_class_names(names, "--classes")
    schedule = NoiseSchedule.make("context_unet", timesteps, beta_start, beta_end)
    with runs.held(out):
        runs.free_folder(out, overwrite)
        try:
            network = ContextUnet(**found)
            load_context_unet_weights(network, state)
        except ValueError as error:
            raise BadInput(f"{weights}: {error}") from error
        more = {"classes": names, "weights": "imported", "sampling": {"variance": "beta"}}
        runs.start_run(out, runs.make_config(network, schedule, "eps", **more), network)
    print(f"imported: {out} ({', '.join(f'{name} {value}' for name, value in found.items())})")
    print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")
