"""Files that are either whole or not there, and that are read as they were written."""

import hashlib
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddpm.errors import BadInput

PARTIAL = re.compile(r"\.fused-ddpm-[0-9a-f]{16}\.partial(\..*)?")
METADATA = "fused_ddpm"


def _lock(handle: int, wait: bool) -> None:
    import fcntl  # POSIX alone has it

    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new file beside `path`, with its suffix and for one writer alone, gone at the end.

    It is locked, and a lock ends with its holder, so that others can tell what the dead left, on a shared file system
    those of other hosts too.
    """
    while True:
        partial = path.with_name(f".fused-ddpm-{secrets.token_hex(8)}.partial{path.suffix}")
        try:
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            error.filename = str(path)
            raise
        with suppress(OSError):  # a file system without locks: there nobody can sweep
            _lock(handle, wait=True)
        if partial.exists():
            break
        os.close(handle)  # it was swept before it was locked
    try:
        yield partial
    finally:
        os.close(handle)
        with suppress(OSError):  # the folder itself may be what is missing
            partial.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the partial files of writers that are dead."""
    for path in [path for path in folder.iterdir() if PARTIAL.fullmatch(path.name)]:
        with suppress(OSError):  # its writer lives, has just removed it, or is another user
            handle = os.open(path, os.O_RDWR)
            try:
                _lock(handle, wait=False)
                path.unlink()
            finally:
                os.close(handle)


@contextmanager
def replacing_all(paths: Sequence[Path], stale: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Temporary files beside `paths`, with their suffixes and for this writer alone, which the block fills.

    What dead writers left in the folder goes first. If the block succeeds they are fsynced, then `stale` files are
    removed, then all are renamed over `paths`: until every byte is on the disk, what was there before stays. Raises
    BadInput naming what cannot be written: the file, or the folder where only that is known.
    """
    partials: list[Path] = []
    try:
        with ExitStack() as made:
            for folder in {path.parent for path in paths}:
                _sweep(folder)
            partials = [made.enter_context(_partial(path)) for path in paths]
            yield partials
            for partial in partials:
                with partial.open("rb") as file:
                    if not os.fstat(file.fileno()).st_size:
                        raise OSError("nothing was written")
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
        # A full disk does not say which file it had no room for.
        unnamed = paths[0] if len(paths) == 1 else paths[0].parent
        named = dict(zip(map(str, partials), paths, strict=False)).get(str(error.filename), error.filename)
        raise BadInput(f"{named or unnamed}: cannot be written ({error.strerror or error})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`replacing_all` of one path."""
    with replacing_all([path]) as (partial,):
        yield partial


def check_writable(path: Path) -> None:
    """Raise BadInput if a file of this name cannot be written: before the work, not after it."""
    try:
        str(path).encode()
        with suppress(FileNotFoundError):
            path.lstat()
        with _partial(path):
            pass
    except UnicodeEncodeError:
        raise BadInput(f"{str(path)!a}: is no name in UTF-8, needs one") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder against other processes of this host that ask for it here. Raises BadInput if one has it.

    Yields False if the folder was removed meanwhile, by one that had made it and left nothing in it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    except OSError as error:
        raise BadInput(f"{folder}: cannot be opened ({error.strerror or error}), needs a folder") from error
    try:
        try:
            _lock(handle, wait=False)
        except BlockingIOError as error:
            raise BadInput(f"{folder}: another process is writing to it, needs another --out or its end") from error
        except OSError as error:
            raise BadInput(f"{folder}: cannot be locked ({error.strerror or error})") from error
        try:
            there = os.path.samestat(os.fstat(handle), folder.stat())
        except FileNotFoundError:
            there = False
        yield there
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file. Not by np.save, whose error hides the errno of a full disk."""
    with replacing(path) as partial, partial.open("wb") as file:
        array = np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def json_text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: object) -> None:
    write_text(path, json_text(value))


def check_readable(path: Path) -> None:
    """Raise BadInput unless this is a file that can be read; of a pipe nobody may be at the other end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInput(f"{path}: is no regular file, needs one")
        path.open("rb").close()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput if there is none."""
    check_readable(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor], **metadata: object) -> bytes:
    """The content of a safetensors file of these tensors, copied to the CPU, with their digest.

    Written by us, not by the library: its Rust error hides the errno of a full disk. The metadata is one JSON entry,
    because the library writes several in any order.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {METADATA: json.dumps(metadata | {"digest": digest_of(plain)})})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: object) -> None:
    """A safetensors file, see `tensor_bytes`."""
    with replacing(path) as partial:
        partial.write_bytes(tensor_bytes(tensors, **metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises BadInput as `read_noted` does."""
    return read_noted(path)[0]


def read_noted(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, metadata) of a safetensors file; of another program's the metadata is empty.

    Raises BadInput if it is missing or damaged, or if the tensors are not those of its digest.
    """
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        whole = isinstance(metadata, dict) and metadata.get("digest") in (None, digest_of(tensors))
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({str(error) or type(error).__name__})") from error
    if not whole:
        raise BadInput(f"{path}: damaged, its content is not what its digest was taken of, needs a whole copy")
    return tensors, metadata


def warn_if_unchecked(path: Path, metadata: Mapping[str, Any]) -> None:
    """Say that a file was read without a digest to check it by."""
    if metadata.get("digest") is None:
        warnings.warn(f"{path}: has no digest (former versions wrote none), so it was not checked", stacklevel=3)
