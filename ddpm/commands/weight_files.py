"""Files of weights that other programs wrote: read without running their code; one network of several in them."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ddpm.errors import BadInput, first_line
from ddpm.files import read_tensors

NESTED_MAX = 8  # levels of containers in containers that are looked through


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


def shape_of(state: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of an entry. Raises ValueError unless it is there, with so many dimensions."""
    found = tuple(state[name].shape) if name in state else None
    if found is None or len(found) != rank:
        raise ValueError(f"{name} is {'missing' if found is None else list(found)}")
    return found


def read_entries(path: Path) -> dict[str, Tensor]:
    """Every tensor in a .pth or .safetensors under its path, say `ema.shadow.out.0.bias`; no code of it runs.

    Raises BadInput, naming the file, for pickled objects, and for one that unpacks to more than it holds.
    """
    return read_versioned(path)[0]


def read_versioned(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """`read_entries`, and the text beside them that is called version."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # the length of a JSON header, then that
    if is_safetensors:
        return read_tensors(path), None
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
    version = content.get("version") if isinstance(content, Mapping) else None
    return _tensors(content), version if isinstance(version, str) else None


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


def places_of(entry: str, entries: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names of the networks that have this entry: "", "ema.ema_model.", ..."""
    return [name.removesuffix(entry) for name in entries if f".{name}".endswith(f".{entry}")]


def take_network(
    path: Path, entries: dict[str, Tensor], places: list[str], online: bool
) -> tuple[str, dict[str, Tensor]]:
    """(its place, the state dict bare of it) of one network of a file, taken out of the entries. Raises BadInput.

    Of several networks it is the moving average, or with `online` the one that is none. What is left is said.
    """
    averages = [len(re.findall(r"(?<![a-z])ema(?![a-z])", place.lower())) for place in places]
    if online and len(places) == 1 and averages[0]:
        raise BadInput(f"--weights: got online, but {path} holds the moving average alone, needs ema")
    wanted = min(averages) if online else max(averages)
    best = [place for place, words in zip(places, averages, strict=True) if words == wanted]
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
    return best[0], state


def say_left_out(path: Path, place: str, entries: Mapping[str, Tensor]) -> None:
    """Warn of what a file has beside the network at this place."""
    if entries:
        beside = f"{len(entries)} tensors beside {place.rstrip('.')} are left out (first: {next(iter(entries))})"
        warnings.warn(f"{path}: {beside}", stacklevel=2)
