"""Data sets: images (or points) in memory, with one-hot labels, other conditions, or none.

Sources, by the text that `--data` takes: `digits` (scikit-learn's), `swiss-roll`, a `.npy` (or `.npz` of one array) of
images [N, H, W, C] or grey [N, H, W], a folder of pictures (subfolders = classes), or an MNIST idx file (`.gz` or not).
"""

import gzip
import hashlib
import logging
import math
import os
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import BadInput, first_line
from ddpm.sizes import Size, asked_sides

logger = logging.getLogger("ddpm")

Range = tuple[float, float]  # the values of black and white

IDX_IMAGES, IDX_LABELS = 2051, 2049
CHUNK = 1 << 20
NO_FILE, NOT_REGULAR = "no such file", "is no regular file"
GENERATED, DIGITS_SIDES = ("digits", "swiss-roll"), (16, 16)
ALL = "all"  # what `--context` takes for every class in turn
SIDE_MAX = 9459  # of a square of the pixels that Pillow takes for safe
DEPTHS = (8, 16)  # bits a channel
IMAGE_SIZE = "side, or HEIGHTxWIDTH: crop to the central part of this shape, resize"  # what --help says of it
CLASSES_MAX = 10_000  # untuned: labels beyond it are taken for something other than classes


@dataclass(frozen=True, eq=False)
class Dataset:
    """values: images [N, C, H, W], uint8 or float32 in [-1, 1], or points float32 [N, features].

    labels: float32 [N, K], one-hot or other conditions, or None; classes: names of the K, or none.
    """

    name: str
    values: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def is_images(self) -> bool:
        return self.values.ndim == 4

    @property
    def has_classes(self) -> bool:
        """Whether every label is a single 1 among zeros."""
        return self.labels is not None and _is_one_hot(self.labels)

    def digest(self) -> str:
        """sha256 over values and labels: what `--resume` compares."""
        sha = hashlib.sha256(repr(tuple(self.values.shape)).encode())
        for tensor in (self.values, self.labels):
            if tensor is not None:
                sha.update(tensor.contiguous().numpy().reshape(-1).view(np.uint8))
        return sha.hexdigest()


def load_data(
    source: str,
    labels: str | None = None,
    image_size: Size | str | None = None,
    classes: Sequence[str] | None = None,
    *,
    value_range: Range | None = None,
    alpha: bool = False,
    depth: int | None = None,
    conditions: bool = True,
) -> Dataset:
    """The data set that `source` names. What was read, and what was not, is logged.

    source: see the module docstring. labels: a `.npy`, `.npz` or idx file for a source that has none: class numbers
    [N] or [N, 1] (those that there are become 0..K-1 and are named by the old ones), or conditions [N, K], one-hot or
    not. image_size: a side, (height, width) or "24x16": crop each image to its central part of this shape (the odd
    pixel stays at the bottom and right), then resize with Pillow's bicubic filter, which averages when it shrinks.
    classes: their names in order of their number, default those of the source; more names than numbers name every
    number from 0.
    value_range: the values of black and white, for numbers that are neither 8 nor 16 bits, or use less of them.
    alpha: keep transparency as a fourth channel. depth: 16 for data that have more than 8 bits a channel, 8 to round
    them to bytes; None takes them as they are. conditions: False for a network without, to which subfolders are no
    classes and digits have none.

    Raises BadInput naming the file, what was found and what is needed.
    """
    sides = None if image_size is None else asked_sides(image_size)
    if sides is not None and not all(1 <= side <= SIDE_MAX for side in sides):
        raise BadInput(f"--image-size: got {image_size}, needs a side of 1..{SIDE_MAX} pixels")
    if depth not in (None, *DEPTHS):
        raise BadInput(f"--depth: got {depth}, needs 8 or 16")
    path = Path(source)
    if labels is not None and (source in GENERATED or path.is_dir()):
        raise BadInput(f"--labels: {source} brings its own classes (or has none), needs no label file")
    for option, given in (("--labels", labels), ("--classes", ",".join(classes or ()) or None)):
        if given is not None and not conditions:
            raise BadInput(f"{option}: got {given}, but the network takes no conditions, needs none")
    if value_range is not None and source in GENERATED:
        raise BadInput(f"--range: {source} has its own values, needs none")
    labelled, names, note = None, (), ""
    if source == "swiss-roll":
        for option, given in (("--image-size", image_size), ("--depth", depth)):
            if given is not None:
                raise BadInput(f"{option}: swiss-roll has points, not images")
        values = _swiss_roll()
    elif source == "digits":
        images, *labelling = _digits()
        labelled, names = labelling if conditions else (None, ())
        values = stacked(((source, image) for image in images), len(images), sides or DIGITS_SIDES)
    elif path.is_dir():
        from ddpm import image_files  # needs Pillow

        values, labelled, names, note = image_files.image_folder(path, sides, value_range, alpha, conditions)
    elif not path.exists():
        raise BadInput(f"{source}: no such file or folder, and not one of digits, swiss-roll")
    else:
        images = _images_of_array(path, value_range, alpha)
        if labels is not None:
            labelled, names = _read_labels(Path(labels), len(images), path, len(classes or ()))
        values = stacked(((path, _taken(image, path, value_range)) for image in images), len(images), sides)
    if alpha and values.shape[1:2] != (4,):
        raise BadInput(f"--alpha: {source} has no transparency, needs pictures or an array [N, H, W, 4]")
    if depth == 16 and values.dtype == np.uint8:
        raise BadInput(f"--depth: got 16, but {source} has 8 bits a channel, needs pictures or an array of more")
    if depth == 8 and values.dtype != np.uint8:
        values += 1
        values *= 127.5
        values = np.rint(values, out=values).astype(np.uint8)
    if classes is not None:
        count = 0 if labelled is None else labelled.shape[1]
        if len(classes) != count:
            raise BadInput(f"--classes: got {len(classes)} names, needs {count} for {source}")
        names = class_names(classes, "--classes")
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank reads
        what = "points" if values.ndim == 2 else "pictures"
        about = f"{len(names)} classes" if labelled is None or names else f"{labelled.shape[1]} conditions"
        about = about if conditions else "without classes, as the network is"
        # What was left out is seen without any logging set up.
        logger.log(logging.WARNING if note else logging.INFO, f"{source}: {len(values)} {what}, {about}{note}")
    name = source if source in GENERATED else path.stem
    return Dataset(name, torch.from_numpy(values), None if labelled is None else torch.from_numpy(labelled), names)


def parse_range(text: str) -> Range:
    """LO,HI of `--range`. Raises BadInput."""
    with suppress(ValueError):
        low, high = map(float, text.split(","))
        if low < high and math.isfinite(high - low):
            return low, high
    raise BadInput(f"--range: got {text!r}, needs LO,HI, the values of black and white, LO < HI")


def to_unit(values: np.ndarray, value_range: Range, named_by: str) -> np.ndarray:
    """float32 in [-1, 1] of numbers between black and white. Raises BadInput, naming `named_by`, for others."""
    low, high = value_range
    least, most = float(values.min()), float(values.max())
    if not (least >= low and most <= high):
        found = f"{least:g}..{most:g}"
        raise BadInput(f"{named_by}: has values {found}, needs {low:g}..{high:g} (--range LO,HI says other ones)")
    unit = np.empty(values.shape, np.float32)
    rows = max(1, (1 << 20) * len(values) // values.size)  # float64 of a part at a time
    for k in range(0, len(values), rows):
        unit[k : k + rows] = ((values[k : k + rows].astype(np.float64) - low) * (2 / (high - low)) - 1).clip(-1, 1)
    return unit


def stacked(pictures: Iterable[tuple[object, np.ndarray]], count: int, sides: tuple[int, int] | None) -> np.ndarray:
    """(where it is from, picture [h, w, c]) -> [count, C, H, W], each brought to `sides` before the next one is made.

    One colour picture makes all of them colour, one float32 picture in [-1, 1] makes all of them that.
    """
    stack = None
    for k, (where, picture) in enumerate(pictures):
        height, width = picture.shape[:2]
        if sides is not None:
            from ddpm import image_files  # needs Pillow

            picture = image_files.fitted(picture, sides)
        picture = picture.transpose(2, 0, 1)
        if stack is None:
            try:
                stack = np.empty((count, *picture.shape), picture.dtype)
            except MemoryError as error:
                size = f"{count} images of {list(picture.shape)}"
                raise BadInput(
                    f"{where}: {size} do not fit into memory, needs fewer or a smaller --image-size"
                ) from error
        if picture.shape[1:] != stack.shape[2:]:
            sizes = f"{height}x{width}, the first image is {stack.shape[2]}x{stack.shape[3]}"
            raise BadInput(f"{where}: is {sizes}: needs --image-size to bring them to one size (height x width)")
        if picture.shape[0] > stack.shape[1]:
            stack = np.repeat(stack, 3, axis=1)
        if picture.dtype != stack.dtype:
            picture, stack = (x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x for x in (picture, stack))
        stack[k] = picture
    return stack


def class_names(names: Iterable[str], named_by: str) -> tuple[str, ...]:
    """The names as keyboards type them: macOS and its archives store accents as characters of their own.

    Raises BadInput, naming `named_by`, for names that `--context` could not tell from each other or from `all`.
    """
    names = tuple(unicodedata.normalize("NFC", name) for name in names)
    wrong = next((name for k, name in enumerate(names) if name in ("", ALL) or name in names[:k]), None)
    if wrong is not None:
        raise BadInput(f"{named_by}: got a class {wrong!r}, needs names that differ, none of them empty or {ALL!r}")
    return names


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, or the only one in a .npz, never unpickling. Raises BadInput if it cannot be read."""
    if not path.is_file():
        raise BadInput(f"{path}: {NOT_REGULAR if path.exists() else NO_FILE}")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: is an empty file, needs a .npy array")
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array as archive:
                names = archive.files
                array = archive[names[0]] if len(names) == 1 and path.suffix.lower() == ".npz" else None
    except Exception as error:  # NumPy parses the header as Python: damage raises nearly anything
        raise BadInput(f"{path}: not a readable .npy array without pickled objects ({first_line(error)})") from error
    if array is None:
        needs = "a .npz of one array" if path.suffix.lower() == ".npz" else "a .npy"
        raise BadInput(f"{path}: is an archive of {len(names)} arrays ({', '.join(names[:9])}), needs {needs}")
    return array


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() in (".npy", ".npz")


def _images_of_array(path: Path, value_range: Range | None, alpha: bool) -> np.ndarray:
    """[N, H, W, C] of a file of one array, its numbers as they are."""
    images = read_npy(path) if _is_npy(path) else _read_idx(path, IDX_IMAGES)
    found = f"{images.dtype} {list(images.shape)}"
    kind, size = images.dtype.kind, images.dtype.itemsize
    if kind == "f" and not np.isfinite(images).all():
        found += " with NaN or infinite values"
    channels = (1, 3, 4) if alpha else (1, 3)
    if images.ndim == 3 and images.shape[-1] not in (1, 3, 4):  # those would be one image
        images = images[..., None]
    known = (kind == "u" and size <= 2) or (value_range is not None and kind in "buif")
    if not known or images.ndim != 4 or images.shape[-1] not in channels:
        more = "grey [N, H, W], uint16, other numbers with --range LO,HI, C = 4 with --alpha"
        raise BadInput(f"{path}: found {found}, needs uint8 [N, H, W, C] with C = 1 or 3 (or {more})")
    if 0 in images.shape:
        raise BadInput(f"{path}: found {found}, needs at least one image")
    return images


def _taken(image: np.ndarray, path: Path, value_range: Range | None) -> np.ndarray:
    """An image of an array: bytes as they are, else float32 in [-1, 1]."""
    if value_range is None and image.dtype == np.uint8:
        return image
    return to_unit(image, value_range or (0, 65535), str(path))


def _digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, [N, 8, 8, 1] of 0..16 brought to 0..255, their one-hot labels, their names."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return small[..., None], np.eye(10, dtype=np.float32)[digits.target], tuple("0123456789")


def held_out(source: str) -> Tensor | None:
    """Points float32 [N, features] of the distribution that a source draws from, other ones; None for other sources."""
    return torch.from_numpy(_swiss_roll(drawn=1)) if source == "swiss-roll" else None


def _swiss_roll(drawn: int = 0) -> np.ndarray:
    """4,096 points of scikit-learn's Swiss roll seen along its axis, the first drawn with mean 0 and variance 1.

    float32 [4096, 2].
    """
    from sklearn.datasets import make_swiss_roll

    first, points = (make_swiss_roll(4096, noise=0.3, random_state=state)[0][:, [0, 2]] for state in (0, drawn))
    points -= first.mean(axis=0)
    return (points / (first - first.mean(axis=0)).std()).astype(np.float32)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """An idx file of unsigned bytes: images [N, H, W, 1] or labels [N] (LeCun's format, big-endian header)."""
    rank = magic & 0xFF
    header, data = 4 + 4 * rank, bytearray()
    if not path.is_file():
        raise BadInput(f"{path}: {NOT_REGULAR if path.exists() else NO_FILE}")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            start = file.read(header)
            if len(start) < header or struct.unpack(">i", start[:4])[0] != magic:
                kind = "images" if magic == IDX_IMAGES else "labels"
                raise BadInput(f"{path}: not a .npy and not an idx file of {kind} (magic number {magic})")
            shape = struct.unpack(f">{rank}i", start[4:])
            size = math.prod(shape) if min(shape) >= 0 else 0
            # No more than the header says, whatever it unpacks to, and no room before there is something to fill it.
            while len(data) <= size and (chunk := file.read(min(CHUNK, size + 1 - len(data)))):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if min(shape) < 0 or len(data) != size:
        found = f"{len(data)} bytes of data" if len(data) <= size else "more data"
        raise BadInput(f"{path}: {found}, its header {list(shape)} needs {math.prod(shape)}")
    array = np.frombuffer(data, np.uint8).reshape(shape)
    return array[..., None] if magic == IDX_IMAGES else array


def _read_labels(path: Path, n: int, images: Path, named: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(float32 [n, K], names of K classes or none) of class numbers [n] or [n, 1], or of conditions [n, K].

    named: how many names the caller has; more than there are different numbers name every number from 0.
    """
    labels = read_npy(path) if _is_npy(path) else _read_idx(path, IDX_LABELS)
    found = f"{labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in {1: "iu", 2: "iufb"}.get(labels.ndim, "") or 0 in labels.shape:
        raise BadInput(f"{path}: found {found}, needs integers [N] or [N, 1], or one-hot or other rows [N, K]")
    if len(labels) != n:
        raise BadInput(f"{path}: {len(labels)} labels for {n} images in {images}, needs one each")
    if labels.dtype.kind in "iu" and labels.size == n:
        labels = labels.reshape(n)
        if labels.min() < 0 or labels.max() >= CLASSES_MAX:
            raise BadInput(f"{path}: classes {labels.min()}..{labels.max()}, needs 0..{CLASSES_MAX - 1}")
        numbers, positions = np.unique(labels.astype(np.int64), return_inverse=True)
        if named > numbers[-1] and named != len(numbers):
            numbers, positions = np.arange(named), labels
        return np.eye(len(numbers), dtype=np.float32)[positions], tuple(map(str, numbers))
    with np.errstate(over="ignore"):  # which is refused below
        rows = labels.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise BadInput(f"{path}: row {bad[0]} is {labels[bad[0]].tolist()}, needs finite numbers, one-hot or others")
    return rows, tuple(map(str, range(rows.shape[1]))) if _is_one_hot(rows) else ()


def _is_one_hot(rows: np.ndarray | Tensor) -> bool:
    return bool(((rows != 0).sum(1) == 1).all() and (rows.sum(1) == 1).all())
