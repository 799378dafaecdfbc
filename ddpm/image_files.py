"""Pictures in files for `ddpm.data`: which files of a folder are pictures, and what they show. Needs Pillow."""

import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ddpm.data import Range, class_names, stacked, to_unit
from ddpm.errors import BadInput, first_line

Sides = tuple[int, int]  # height, width

# Formats whose suffix Pillow knows and which it cannot draw by itself, beside those it only has stubs of.
UNDRAWN = {"EPS", "IPTC", "MPEG"}
# Formats whose further frames belong to one picture: previews of a photo, layers of a drawing.
ONE_PICTURE = {"MPO", "PSD"}
# How a picture is turned to be seen, by EXIF's orientation; 1 is as it is stored.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of 16 bits a channel Pillow keeps the high byte in all but grey pictures; read in the other byte order, the low one.
OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 258, 262, 284


def suffixes() -> set[str]:
    """Of the files that Pillow can draw here."""
    Image.init()
    kinds = {name: kind for name, (kind, _) in Image.OPEN.items()}
    stubs = {
        name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, ImageFile.StubImageFile)
    }
    drawn = kinds.keys() - stubs - UNDRAWN | {"MPO"}  # MPO is opened as JPEG
    return {suffix for suffix, name in Image.registered_extensions().items() if name in drawn}


def image_folder(
    folder: Path, sides: Sides | None, value_range: Range | None, alpha: bool, classes: bool = True
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...], str]:
    """(pictures [N, C, H, W], one-hot labels or None, names of classes, a note of what was left out) of a folder.

    One picture is held at its full size at a time. classes: whether subfolders are some, see `find_pictures`.
    """
    files, numbers, names, skipped = find_pictures(folder, classes)
    further = []

    def pictures() -> Iterator[tuple[Path, np.ndarray]]:
        for path in files:
            picture, more = read_picture(path, sides, value_range, alpha)
            further.extend([path] * more)
            yield path, picture

    values = stacked(pictures(), len(files), sides)
    if value_range is not None and values.dtype == np.uint8:
        raise BadInput(f"--range: all pictures in {folder} have 8 bits a channel, needs none")
    note = f"; {len(skipped)} files skipped"
    note += f" (first: {skipped[0].relative_to(folder)})" if skipped else ""
    if further:
        note += f"; of {len(further)} files the first of several frames (first: {further[0].relative_to(folder)})"
    return values, None if numbers is None else np.eye(len(names), dtype=np.float32)[numbers], names, note


def find_pictures(
    folder: Path, classes: bool = True
) -> tuple[list[Path], np.ndarray | None, tuple[str, ...], list[Path]]:
    """(pictures in sorted order, class numbers int64 [N] or None, names of the classes, files that are none).

    Subfolders are the classes, with all that lies below them, or without `classes` nothing but places where pictures
    lie. Hidden files and folders are no pictures.
    """
    known, skipped = suffixes(), []

    def pictures(paths: Iterator[Path]) -> list[Path]:
        found = []
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (skipped if hidden or path.suffix.lower() not in known else found).append(path)
        return found

    try:
        inside = list(folder.iterdir() if classes else _files_below(folder))
        inside.sort(key=lambda path: unicodedata.normalize("NFC", path.name))
        loose = pictures(path for path in sorted(inside) if not path.is_dir())
        by_class = {path: pictures(_files_below(path)) for path in inside if path.is_dir()}
    except OSError as error:
        raise BadInput(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error
    by_class = {path: found for path, found in by_class.items() if not path.name.startswith(".")}
    skipped.sort(key=lambda path: path.relative_to(folder).parts[0].startswith("."))
    files = [path for found in by_class.values() for path in found]
    if not files and not loose:
        raise BadInput(f"{folder}: no images found, needs .png, .jpg, .tif and the like ({len(skipped)} other files)")
    if not files:
        return loose, None, (), skipped
    if loose:
        raise BadInput(f"{loose[0]}: lies beside subfolders of classes, needs to be in one of them")
    names = class_names((path.name for path in by_class), str(folder))
    empty = next((path for path, found in by_class.items() if not found), None)
    if empty is not None:
        raise BadInput(f"{empty}: a class folder without images")
    return files, np.repeat(np.arange(len(names)), [len(found) for found in by_class.values()]), names, skipped


def _files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files in a folder and, through links too, in those below it."""
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from _files_below(path, above)


def fitted(picture: np.ndarray, sides: Sides) -> np.ndarray:
    """The central part of this shape of a picture [h, w, c], uint8 or float32 in [-1, 1], bicubic to [*sides, c]."""
    channels = picture.shape[2]
    if picture.shape[:2] == sides:
        return picture
    if picture.dtype == np.uint8:
        image = Image.fromarray(picture[..., 0] if channels == 1 else picture)
        return np.asarray(_fitted(image, sides)).reshape(*sides, channels)
    planes = list(np.moveaxis(picture, 2, 0))
    alpha = planes.pop() if channels == 4 else None
    return _joined(planes, alpha, sides)


def _joined(colours: Iterable[np.ndarray], alpha: np.ndarray | None, sides: Sides | None) -> np.ndarray:
    """Float32 planes [h, w] in [-1, 1] -> [h, w, c], or bicubic to [*sides, c]; one plane at a time is copied."""
    if sides is None:
        return np.stack([*colours, *([] if alpha is None else [alpha])], axis=2)

    def small(plane: np.ndarray) -> np.ndarray:
        return np.asarray(_fitted(Image.fromarray(plane), sides))

    if alpha is None:
        return np.stack([small(plane) for plane in colours], axis=2).clip(-1, 1)
    # As Pillow does with bytes: what is transparent has no colour to give to its neighbours.
    opacity = (alpha + 1) / 2
    seen = [small((plane + 1) * opacity - 1) for plane in colours]
    alpha = small(alpha)
    opacity = (alpha + 1) / 2
    seen = [(plane + 1) / np.where(opacity > 0, opacity, 1) - 1 for plane in seen]
    return np.stack([*seen, alpha], axis=2).clip(-1, 1)


def _fitted(image: Image.Image, sides: Sides) -> Image.Image:
    height, width = sides
    high = min(image.height, max(1, round(image.width * height / width)))
    wide = min(image.width, max(1, round(image.height * width / height)))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    if image.size != (wide, high):
        image = image.crop((left, top, left + wide, top + high))
    return image if (high, wide) == sides else image.resize((width, height), Image.Resampling.BICUBIC)


def read_picture(path: Path, sides: Sides | None, value_range: Range | None, alpha: bool) -> tuple[np.ndarray, bool]:
    """(what a file shows, turned as it is seen, whether it has further frames, which are left out).

    uint8 [h, w, c], or of more than 8 bits float32 in [-1, 1], brought to `sides` if there are any; grey in any form
    has one channel, other pictures three. Transparent parts are laid on white, with `alpha` kept as a fourth channel.
    While it is brought to `sides` a picture takes at most some 24 bytes a pixel. Raises BadInput.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such regular file")
    try:
        with warnings.catch_warnings():
            # A picture of more pixels than Pillow finds safe (89 million) costs gigabytes, however small its file.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            more = image.format not in ONE_PICTURE and getattr(image, "is_animated", False)
            deep = _deep_values(path, image)
            values = _eight_bits(_seen(image), sides, alpha) if deep is None else None
    except BadInput:
        raise
    except Exception as error:  # damage raises nearly anything
        raise BadInput(f"{path}: not a readable image ({first_line(error)})") from error
    if values is not None:
        return values, more
    planes, known, opacity, inverted = deep
    if value_range is None and known is None:
        raise BadInput(f"{path}: holds {planes[0].dtype}, needs --range LO,HI, the values of black and white")

    def units() -> Iterator[np.ndarray]:
        while planes:
            plane = to_unit(planes.pop(0), value_range or known, str(path))
            plane = -plane if inverted else plane
            yield plane if opacity is None or alpha else (plane - 1) * opacity + 1

    if not alpha:
        return _joined(units(), None, sides), more
    opaque = np.ones_like(planes[0], np.float32) if opacity is None else 2 * opacity - 1
    return _joined(units() if len(planes) == 3 else [*units()] * 3, opaque, sides), more


def _seen(image: Image.Image) -> Image.Image:
    """The picture as viewers show it. TIFF is turned by Pillow, which then no longer names an orientation."""
    image.load()
    orientation = 1
    with suppress(Exception):  # damaged EXIF beside whole pixels: viewers go by the pixels
        orientation = image.getexif().get(ORIENTATION, 1)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _eight_bits(image: Image.Image, sides: Sides | None, alpha: bool) -> np.ndarray:
    """uint8 [h, w, c] of a picture whose channels have at most 8 bits, brought to `sides` if there are any."""

    def array(image: Image.Image) -> np.ndarray:
        return np.atleast_3d(np.asarray(image if sides is None else _fitted(image, sides)))

    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if alpha:
        return array(image.convert("RGBA"))
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return array(image.convert("L"))
    grey, palette = image.mode in ("1", "L", "LA"), image.mode in ("P", "PA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if palette:
        red, green, blue = (band.tobytes() for band in image.split())
        grey = red == green == blue
    return array(image)[..., : 1 if grey else 3]


Deep = tuple[list[np.ndarray], Range | None, np.ndarray | None, bool]


def _deep_values(path: Path, image: Image.Image) -> Deep | None:
    """Of a picture of more than 8 bits a channel: (1 or 3 planes [h, w], their range if known, opacity, inverted).

    opacity: float32 [h, w] in [0, 1] or None. inverted: the least value is white. None for other pictures.
    """
    tags = getattr(image, "tag_v2", {})
    bits, name = max(tags.get(TIFF_BITS, (8,))), image.format
    codec, arguments = (image.tile[0][0], image.tile[0][3]) if image.tile else ("", "")
    rawmode = arguments if isinstance(arguments, str) else str((*(arguments or ()), "")[0])
    kind, _, depth = rawmode.partition(";")
    numbers = image.mode[0] in "IF"
    if not numbers and depth not in OTHER_ORDER and bits <= 8 and codec != "SGI16":
        return None
    if tags.get(TIFF_PLANES) == 2 or not (numbers or (kind in ("LA", "RGB", "RGBX", "RGBA") and depth in OTHER_ORDER)):
        needs = "16 bits as grey, RGB or RGBA, its channels together"
        raise BadInput(f"{path}: has more than 8 bits a channel as {name} {rawmode}, needs {needs}")
    white = 2**bits - 1 if 8 < bits < 16 else 65535
    transparent = image.info.get("transparency")
    opacity, known = None, True
    if numbers:
        values = np.asarray(_seen(image))
        known = image.mode.startswith("I;16") or (image.mode == "I" and name in ("PNG", "PPM"))
        planes = [values.astype(values.dtype.newbyteorder("="))]
    else:
        if kind == "LA":  # Pillow has no second order of it; four bytes a pixel are also what RGBA has
            of_both = _reread(path, "RGBA")
            high, low = of_both[::2], of_both[1::2]
        else:
            high, low = (_reread(path, order) for order in (rawmode, f"{kind};{OTHER_ORDER[depth]}"))
        planes = [high.pop(0).astype(np.uint16) << 8 | low.pop(0) for _ in range(len(high))]
    if len(planes) in (2, 4):
        opacity = planes.pop() / np.float32(white)
    elif transparent is not None:
        differs = [plane != clear for plane, clear in zip(planes, np.atleast_1d(transparent), strict=True)]
        opacity = np.any(differs, axis=0).astype(np.float32)
    return planes, (0, white) if known else None, opacity, tags.get(TIFF_PHOTOMETRIC) == 0


def _reread(path: Path, rawmode: str) -> list[np.ndarray]:
    """Planes uint8 [h, w] of the picture decoded once more, its bytes taken for this arrangement."""
    with Image.open(path) as image:
        tiles = []
        for tile in image.tile:
            arguments = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
            tiles.append(type(tile)(*tile[:3], arguments) if hasattr(tile, "_fields") else (*tile[:3], arguments))
        image.tile = tiles
        seen = _seen(image)
        return [np.asarray(seen.getchannel(k)) for k in range(len(seen.getbands()))]
