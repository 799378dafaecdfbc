"""Images of files for `ddpm.data`: folders of pictures, brought to one size and one mode. Needs Pillow."""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.data import check_class_names
from ddpm.errors import BadInput

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def fitted(images: Iterable[np.ndarray], side: int) -> np.ndarray:
    """uint8 images [h, w] or [h, w, 3] -> [N, side, side, C]: their central squares, bicubic."""
    return np.stack([_fit(Image.fromarray(image), side) for image in images])


def _fit(image: Image.Image, side: int) -> np.ndarray:
    """Central square, bicubic to side x side: uint8 [side, side, C]."""
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    image = image.crop((left, top, left + square, top + square))
    if square != side:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(side, side, -1)


def image_folder(folder: Path, side: int | None) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Images of a folder in sorted order; subfolders are classes. All grey -> 1 channel, else RGB on white."""
    by_class = {sub: _images_in(sub) for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."}
    loose, names = _images_in(folder), tuple(sub.name for sub in by_class)
    files = [path for paths in by_class.values() for path in paths]
    if files and loose:
        raise BadInput(f"{loose[0]}: lies beside subfolders of classes, needs to be in one of them")
    if files:
        check_class_names(names, str(folder))
    elif not loose:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise BadInput(f"{folder}: no images found, needs {known} (in class subfolders or not)")
    opened = {path: _open(path) for path in files or loose}
    mode = "L" if all(image.mode in ("L", "1") for image in opened.values()) else "RGB"
    arrays = []
    for path, image in opened.items():
        image = image.convert(mode)
        array = _fit(image, side) if side else np.asarray(image).reshape(image.height, image.width, -1)
        if arrays and array.shape != arrays[0].shape:
            sizes = f"{image.width}x{image.height}, the first image is {arrays[0].shape[1]}x{arrays[0].shape[0]}"
            raise BadInput(f"{path}: is {sizes}: needs --image-size to bring them to one size")
        arrays.append(array)
    if not files:
        return np.stack(arrays), None, ()
    empty = next((sub for sub, paths in by_class.items() if not paths), None)
    if empty is not None:
        raise BadInput(f"{empty}: a class folder without images")
    classes = np.repeat(np.arange(len(names)), [len(paths) for paths in by_class.values()])
    return np.stack(arrays), np.eye(len(names), dtype=np.float32)[classes], names


def _images_in(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if not p.name.startswith(".") and p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in files if not p.is_dir())


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("L", "1"):
                return image.copy()
            if image.mode[0] in "IF":
                raise BadInput(f"{path}: has more than 8 bits per channel (mode {image.mode}), needs 8")
            rgba = image.convert("RGBA")
    except UNREADABLE as error:
        raise BadInput(f"{path}: not a readable image ({error})") from error
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
