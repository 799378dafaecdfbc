"""Data sets: images (or points) in memory, with one-hot labels or none.

Sources, by the text that `--data` takes: `digits` (scikit-learn's), `swiss-roll`, a `.npy` of uint8 [N, H, W, C],
a folder of images (subfolders = classes), or an MNIST idx file of images (`.gz` or not).
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import BadInput

IDX_IMAGES, IDX_LABELS = 2051, 2049
GENERATED, DIGITS_SIDE = ("digits", "swiss-roll"), 16
ALL = "all"  # what `--context` takes for every class in turn
CLASSES_MAX = 10_000  # untuned: labels beyond it are taken for something other than classes


@dataclass(frozen=True, eq=False)
class Dataset:
    """values: uint8 [N, C, H, W] or float32 [N, features]; labels: one-hot float32 [N, K] or None; classes: K names."""

    name: str
    values: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def is_images(self) -> bool:
        return self.values.dtype == torch.uint8

    def digest(self) -> str:
        """sha256 over values and labels: what `--resume` compares."""
        sha = hashlib.sha256(repr(tuple(self.values.shape)).encode())
        for tensor in (self.values, self.labels):
            if tensor is not None:
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()


def load_data(
    source: str, labels: str | None = None, image_size: int | None = None, classes: Sequence[str] | None = None
) -> Dataset:
    """The data set that `source` names.

    source: see the module docstring. labels: a `.npy` (one-hot [N, K] or integer [N]) or an idx file, for a source that
    has none. image_size: crop each image to its central square (the odd pixel stays at the bottom and right), then
    resize to this side with Pillow's bicubic filter, which averages when it shrinks. classes: their names in order of
    their number, default those of the source.

    Raises BadInput naming the file, what was found and what is needed.
    """
    if image_size is not None and image_size < 1:
        raise BadInput(f"--image-size: got {image_size}, needs a side of at least 1 pixel")
    path = Path(source)
    if labels is not None and (source in GENERATED or path.is_dir()):
        raise BadInput(f"--labels: {source} brings its own classes (or has none), needs no label file")
    if source == "digits":
        images, one_hot, names = _digits(image_size or DIGITS_SIDE)
    elif source == "swiss-roll":
        if image_size is not None:
            raise BadInput("--image-size: swiss-roll has points, not images")
        images, one_hot, names = _swiss_roll(), None, ()
    elif path.is_dir():
        from ddpm import image_files  # needs Pillow

        images, one_hot, names = image_files.image_folder(path, image_size)
    elif not path.exists():
        raise BadInput(f"{source}: no such file or folder, and not one of digits, swiss-roll")
    else:
        images = read_npy(path) if path.suffix == ".npy" else _read_idx(path, IDX_IMAGES)
        found = f"{images.dtype} {list(images.shape)}"
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            found += " with NaN or infinite values"
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise BadInput(f"{path}: found {found}, needs uint8 [N, H, W, C] with C = 1 or 3")
        if 0 in images.shape:
            raise BadInput(f"{path}: found {found}, needs at least one image")
        if image_size is not None:
            squeezed = images[..., 0] if images.shape[-1] == 1 else images
            from ddpm import image_files

            images = image_files.fitted(squeezed, image_size)
        one_hot = None if labels is None else _read_labels(Path(labels), len(images), path)
        names = () if one_hot is None else tuple(str(k) for k in range(one_hot.shape[1]))
    if images.ndim == 4:
        if images.shape[1] != images.shape[2]:
            raise BadInput(f"{source}: images are {images.shape[2]}x{images.shape[1]}, needs squares (or --image-size)")
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if classes is not None:
        if len(classes) != len(names):
            raise BadInput(f"--classes: got {len(classes)} names, needs {len(names)} for {source}")
        check_class_names(classes, "--classes")
        names = tuple(classes)
    name = source if source in GENERATED else path.stem
    return Dataset(name, torch.from_numpy(images), None if one_hot is None else torch.from_numpy(one_hot), names)


def check_class_names(names: Sequence[str], named_by: str) -> None:
    """Raise BadInput, naming `named_by`, for names that `--context` could not tell from each other or from `all`."""
    wrong = next((name for k, name in enumerate(names) if name in ("", ALL) or name in names[:k]), None)
    if wrong is not None:
        raise BadInput(f"{named_by}: got a class {wrong!r}, needs names that differ, none of them empty or {ALL!r}")


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, never unpickling. Raises BadInput if it cannot be read."""
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise BadInput(f"{path}: is an empty file, needs a .npy array")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: damage raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path}: not a readable .npy array without pickled objects ({reason})") from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: is an archive of several arrays, needs a .npy of one")
    return array


def _digits(side: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 8x8 of 0..16, brought to side x side of 0..255 by Pillow's bicubic filter."""
    from sklearn.datasets import load_digits

    from ddpm import image_files

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return image_files.fitted(small, side), np.eye(10, dtype=np.float32)[digits.target], tuple("0123456789")


def _swiss_roll() -> np.ndarray:
    """4,096 points of scikit-learn's Swiss roll seen along its axis, mean 0, variance 1: float32 [4096, 2]."""
    from sklearn.datasets import make_swiss_roll

    points = make_swiss_roll(4096, noise=0.3, random_state=0)[0][:, [0, 2]]
    points -= points.mean(axis=0)
    return (points / points.std()).astype(np.float32)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """An idx file of unsigned bytes: images [N, H, W, 1] or labels [N] (LeCun's format, big-endian header)."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    rank = magic & 0xFF
    header = 4 + 4 * rank
    if len(raw) < header or struct.unpack(">i", raw[:4])[0] != magic:
        kind = "images" if magic == IDX_IMAGES else "labels"
        raise BadInput(f"{path}: not a .npy and not an idx file of {kind} (magic number {magic})")
    shape = struct.unpack(f">{rank}i", raw[4:header])
    if min(shape) < 0 or len(raw) - header != math.prod(shape):
        raise BadInput(f"{path}: {len(raw) - header} bytes of data, its header {list(shape)} needs {math.prod(shape)}")
    array = np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
    return array[..., None] if magic == IDX_IMAGES else array


def _read_labels(path: Path, n: int, images: Path) -> np.ndarray:
    """Labels as one-hot float32 [N, K], from one-hot [N, K] or integers [N]."""
    if path.suffix != ".npy" and not path.exists():
        raise BadInput(f"{path}: no such file")
    labels = read_npy(path) if path.suffix == ".npy" else _read_idx(path, IDX_LABELS)
    found = f"{labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in {1: "iu", 2: "iufb"}.get(labels.ndim, ""):
        raise BadInput(f"{path}: found {found}, needs integers [N] or one-hot rows [N, K]")
    if len(labels) != n:
        raise BadInput(f"{path}: {len(labels)} labels for {n} images in {images}, needs one each")
    if labels.ndim == 1:
        if labels.min() < 0 or labels.max() >= CLASSES_MAX:
            raise BadInput(f"{path}: classes {labels.min()}..{labels.max()}, needs 0..{CLASSES_MAX - 1}")
        return np.eye(int(labels.max()) + 1, dtype=np.float32)[labels.astype(np.int64)]
    bad = np.flatnonzero((np.sort(labels.astype(np.float64), axis=1)[:, :-1] != 0).any(1) | (labels.sum(1) != 1))
    if bad.size:
        raise BadInput(f"{path}: row {bad[0]} is {labels[bad[0]].tolist()}, needs a one-hot row (a single 1)")
    return labels.astype(np.float32)
