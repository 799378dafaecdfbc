"""`ddpm import`: published ContextUnet weights in, run folder out."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ddpm import runs
from ddpm.data import check_class_names
from ddpm.errors import BadInput, first_line
from ddpm.files import read_tensors
from ddpm.networks import ContextUnet, load_context_unet_weights
from ddpm.schedule import NoiseSchedule

FIRST = "init_conv.conv1.0.weight"  # every network of this kind has it, and so tells where in a file it lies
STATISTICS = "init_conv.conv1.1.running_mean"
NESTED_MAX = 8  # levels of containers in containers that are looked through
LEVELS_MAX = 16  # of a network; at 16 its sides are multiples of 65,536 pixels


class _Ignored:
    """What stands for the plain objects that people save beside their weights: nothing of theirs is made or run."""

    NAMES = (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"pathlib{local}.{kind}Path" for local in ("", "._local") for kind in ("Posix", "Windows")),
    )

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_entries(path: Path) -> dict[str, Tensor]:
    """Every tensor in a .pth or .safetensors under its path, say `ema.shadow.out.0.bias`; no code of it runs.

    Raises BadInput, naming the file, for pickled objects, and for one that unpacks to more than it holds.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # the length of a JSON header, then that
    if is_safetensors:
        return read_tensors(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(record.file_size for record in archive.infolist())
                if unpacked > path.stat().st_size:
                    raise ValueError(f"{unpacked} bytes in a file of {path.stat().st_size}")
                damaged = archive.testzip()  # PyTorch compares no checksums
            if damaged is not None:
                raise ValueError(f"{damaged} does not have its checksum")
        with torch.serialization.safe_globals([(_Ignored, name) for name in _Ignored.NAMES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers of old formats raise nearly anything on damaged bytes
        text, needs = str(error), ""
        reason = "damaged, or with pickled objects" if isinstance(error, UnpicklingError) else first_line(error)
        pickled = re.search(r"GLOBAL (\S+)", text)
        if pickled or "TorchScript" in text:
            reason = f"a pickled {pickled[1]}" if pickled else "TorchScript"
            needs = ", needs those: torch.save(model.state_dict(), FILE)"
        raise BadInput(f"{path}: not a PyTorch file of weights alone ({reason}){needs}") from error
    return _tensors(content)


def _tensors(content: object) -> dict[str, Tensor]:
    """The tensors in containers in containers, each container once, by their keys joined with dots."""
    found, seen, waiting = {}, set(), [("", content, 0)]
    for name, value, depth in waiting:  # grows meanwhile
        if isinstance(value, Tensor):
            found[name] = value.detach()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen and depth < NESTED_MAX:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), each, depth + 1) for key, each in items]
    return found


def network_in(path: Path) -> dict[str, Tensor]:
    """The state dict of the ContextUnet in a file, bare of what training loops wrap it in. Raises BadInput.

    Of several networks it takes the moving average. What else the file has is left out, which is said.
    """
    entries = read_entries(path)
    places = [name.removesuffix(FIRST) for name in entries if f".{name}".endswith(f".{FIRST}")]
    if not places:
        raise BadInput(f"{path}: not a ContextUnet state dict ({len(entries)} tensors, none of them {FIRST})")
    # Averages of parameters alone, and the optimiser's state, have no BatchNorm statistics.
    places = [place for place in places if place + STATISTICS in entries] or places
    averages = [len(re.findall(r"(?<![a-z])ema(?![a-z])", place.lower())) for place in places]
    best = [place for place, words in zip(places, averages, strict=True) if words == max(averages)]
    if len(best) > 1:
        named = ", ".join(place.rstrip(".") or "the top" for place in best)
        raise BadInput(f"{path}: holds {len(best)} networks (at {named}), needs one of them alone")
    state = {name.removeprefix(best[0]): entries.pop(name) for name in list(entries) if name.startswith(best[0])}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise BadInput(f"{path}: {name!r} is {kind}, needs a dense tensor with its values")
    claimed, size = sum(tensor.nbytes for tensor in state.values()), path.stat().st_size
    if claimed > size:
        raise BadInput(f"{path}: {claimed} bytes of weights in a file of {size}, needs one that holds them")
    if entries:
        beside = f"{len(entries)} tensors beside {best[0].rstrip('.')} are left out (first: {next(iter(entries))})"
        warnings.warn(f"{path}: {beside}", stacklevel=2)
    return state


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the ContextUnet that has these weights. Raises ValueError if there is none."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tuple(state[name].shape) if name in state else None
        if found is None or len(found) != rank:
            raise ValueError(f"{name} is {'missing' if found is None else list(found)}")
        return found

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


def import_weights(
    weights: Annotated[Path, typer.Argument(help="weights of a ContextUnet: .pth, .ckpt, .safetensors")],
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
    state = with_context(network_in(weights))
    try:
        found = arguments_of(state)
    except ValueError as error:
        raise BadInput(f"{weights}: not a ContextUnet state dict ({error})") from None
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
            with torch.device("meta"):  # what the file claims costs no memory; it takes over the tensors themselves
                network = ContextUnet(**found)
            load_context_unet_weights(network, state)
        except (ValueError, RuntimeError, OverflowError) as error:  # sizes beyond what PyTorch counts
            raise BadInput(f"{weights}: {error}") from error
        more = {"classes": names, "weights": "imported", "sampling": {"variance": "beta"}}
        runs.start_run(out, runs.make_config(network, schedule, "eps", **more), network)
    print(f"imported: {out} ({', '.join(f'{name} {value}' for name, value in found.items())})")
    print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")
