"""Files that are either whole or not there."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddpm.errors import BadInput


@contextmanager
def replacing_all(paths: Sequence[Path], stale: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Temporary paths beside `paths`, with their suffixes, which the block writes.

    If it succeeds they are fsynced, then `stale` files are removed, then all are renamed over `paths`: until every
    byte is on the disk, what was there before stays. Raises BadInput naming the file if it cannot be written.
    """
    partials = [path.with_name(f".{path.stem}.partial{path.suffix}") for path in paths]
    try:
        yield partials
        for partial in partials:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for path in stale:
            path.unlink(missing_ok=True)
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
        folder = os.open(paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BadInput(f"{paths[0]}: cannot be written ({error.strerror or error})") from error
    finally:
        for partial in partials:
            with suppress(OSError):  # the folder itself may be what is missing
                partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`replacing_all` of one path."""
    with replacing_all([path]) as (partial,):
        yield partial


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for it here. Raises BadInput if one has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BadInput(f"{folder}: another process is writing to it, needs another --out or its end") from error
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: object) -> None:
    write_text(path, json_text(value))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: found a JSON {type(value).__name__}, needs an object")
    return value


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted (name, dtype, shape, bytes) of the tensors: the name of weights everywhere."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(repr((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))).encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor], **metadata: object) -> bytes:
    """The content of a safetensors file of these tensors, copied to the CPU.

    Written by us, not by the library: its Rust error hides the errno of a full disk. The metadata is one JSON entry,
    because the library writes several in any order.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"fused_ddpm": json.dumps(metadata)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: object) -> None:
    """A safetensors file, see `tensor_bytes`."""
    with replacing(path) as partial:
        partial.write_bytes(tensor_bytes(tensors, **metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises BadInput if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from error
