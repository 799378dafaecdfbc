"""Sizes of pictures: one side, or height and width, in this order."""

import re
from collections.abc import Sequence

from ddpm.errors import BadInput, check_integer

Size = int | Sequence[int]


def sides_of(size: Size, name: str = "image_size", low: int = 1) -> tuple[int, int]:
    """(height, width), integers >= low. Raises ValueError, which begins with the name, for what is no size."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"{name}: got {size!r}, needs one side, or (height, width)")
    for side in sides:
        check_integer(name, side, low)
    return int(sides[0]), int(sides[1])


def asked_sides(size: Size | str, name: str = "--image-size") -> tuple[int, int]:
    """(height, width), integers >= 0, also of a text: "16", "24x16". Raises BadInput."""
    if not isinstance(size, str):
        try:
            return sides_of(size, name, low=0)
        except ValueError as error:
            raise BadInput(str(error)) from error
    found = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", size)
    if found is None:
        raise BadInput(f"{name}: got {size!r}, needs a side in pixels, or HEIGHTxWIDTH")
    return int(found[1]), int(found[2] or found[1])


def short(sides: Sequence[int]) -> int | str:
    """As it is stored and shown: the side of a square, else "24x16"."""
    height, width = sides
    return height if height == width else f"{height}x{width}"
