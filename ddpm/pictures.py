"""What people look at: labelled grids, trajectory GIFs, scatter plots, loss curves."""

import io
import math
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.files import replacing, replacing_all

# Small images are enlarged by a whole factor, their longer side to at most this; moving noise costs bytes, so GIFs are
# smaller.
CELL_PIXELS, GIF_CELL_PIXELS = 64, 48
GAP, MARGIN = 4, 10
INK, PAPER, FRAME = "#202020", "#ffffff", "#d0d0d0"
GIF_FRAME_MS, GIF_LAST_MS = 60, 2500
GIF_FRAMES_MAX, GIF_COLOURS = 40, 128
POINTS_LIMIT = 2.5
CHANNELS = (1, 3, 4)  # grey, colour, colour and opacity
PNG_COLOURS = {1: 0, 3: 2, 4: 6}
FILES_AT_ONCE = 256  # each is open until all are whole, and a process may have 1,024 open, by default


def to_values(images: Tensor, depth: int = 8) -> np.ndarray:
    """[n, C, H, W] in [-1, 1], clamped -> uint8 or, of 16 bits, uint16 [n, H, W, C]."""
    values = (images.clamp(-1, 1) + 1) * ((2**depth - 1) / 2)
    return values.round().permute(0, 2, 3, 1).cpu().numpy().astype(f"u{depth // 8}")


def to_pixels(images: Tensor, alpha: bool = False) -> np.ndarray:
    """[n, C, H, W] in [-1, 1], clamped -> uint8 [n, H, W, 3], what is transparent on white; 4 kept with `alpha`."""
    if images.shape[1] == 4 and not alpha:
        colour, opacity = images.clamp(-1, 1).split((3, 1), dim=1)
        images = (colour - 1) * (opacity + 1) / 2 + 1
    pixels = to_values(images)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def render(
    samples: Tensor, columns: int | None = None, headers: Sequence[str] = (), caption: str = "", cell: int = CELL_PIXELS
) -> Image.Image:
    """A picture of samples: a grid of images [n, C, H, W] or a scatter plot of points [n, 2].

    columns defaults to a square grid; headers name the columns; caption stands below; cell is the longer side of an
    image. Of four channels the picture is RGBA: the images are transparent where the samples are.
    Where no installed font has a text, the characters that are missing are shown as code points.
    """
    if samples.ndim == 2:
        return _scatter(samples, caption)
    pixels = to_pixels(samples, alpha=True)
    n, height, width = pixels.shape[:3]
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    scale = max(1, cell // max(height, width))
    size = 14 if cell >= CELL_PIXELS else 10
    cell_w, cell_h = width * scale + GAP, height * scale + GAP
    titles = [_legible(header, size) for header in headers[:columns]]
    caption, font = _legible(caption, size)
    # Code points stand below each other: a column is about one of them wide.
    lines = [shown.split("\n") for shown, _ in titles]
    most = max(map(len, lines), default=0)
    top = MARGIN + most * (size + GAP)
    bottom = MARGIN + (size + 2 * GAP if caption else 0)
    wide = columns * cell_w - GAP
    if caption:
        caption = caption.replace("\n,", ",").replace("\n", " ")
        wide = max(wide, math.ceil(font.getlength(caption)))
    mode, high = "RGBA" if samples.shape[1] == 4 else "RGB", rows * cell_h - GAP + top + bottom
    canvas = Image.new(mode, (wide + 2 * MARGIN, high), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (_, own) in enumerate(titles):
        for row, line in enumerate(lines[column], most - len(lines[column])):
            place = MARGIN + column * cell_w + (cell_w - GAP) // 2, MARGIN + size - 2 + row * (size + GAP)
            draw.text(place, _shorten(line, own, cell_w - 2), INK, own, anchor="ms")
    for k in range(n):
        x, y = MARGIN + k % columns * cell_w, top + k // columns * cell_h
        tile = Image.fromarray(pixels[k]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=FRAME)
        canvas.paste(tile, (x, y))
    if caption:
        draw.text((MARGIN, canvas.height - MARGIN), caption, INK, font, anchor="lb")
    return canvas


def header_of(name: str, number: int) -> str:
    """What stands above a class: its name, after its number where no installed font has all of its characters."""
    return name if _font_of(name, 14) is not None else f"{number} {name}"


def _legible(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """(the text, or a line for each of its characters that no font has: U+72AC, and the font that has it)."""
    font = _font_of(text, size)
    if font is not None:
        return text, font
    plain, shown = ImageFont.load_default(size), ""
    for character in text:
        shown += character if _has(plain, character) else f"\nU+{ord(character):04X}\n"
    return "\n".join(line.strip() for line in shown.split("\n") if line.strip()), plain


@lru_cache(maxsize=256)
def _font_of(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow's own font if it has all characters, else one of matplotlib's or the system's, else None."""
    font = ImageFont.load_default(size)
    if all(_has(font, character) for character in text):
        return font
    for path in _installed_fonts():
        try:
            font = ImageFont.truetype(path, size)
            if all(_has(font, character) for character in text):
                return font
        except OSError:  # of bitmaps in other sizes, or no font after all
            continue
    return None


@lru_cache(maxsize=1)
def _installed_fonts() -> list[str]:
    """The last resort of macOS has a box for everything."""
    if find_spec("matplotlib") is None:
        return []
    import matplotlib
    from matplotlib import font_manager

    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return [str(own), *sorted(path for path in font_manager.findSystemFonts() if "LastResort" not in path)]


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font draws a character as something else than what it draws for U+FFFF, which is none."""
    if character.isspace() or unicodedata.category(character) == "Cf":
        return True
    if unicodedata.category(character) in ("Cc", "Cs"):
        return False
    drawn, missing = font.getmask(character), font.getmask("\uffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    shown, end = text, ""
    while shown and font.getlength(shown + end) > width:
        shown, end = shown[:-1], "…"
    return shown + end


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, so many inches wide and high."""
    from matplotlib.figure import Figure  # imported only where it is used

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def image_of(figure: Any) -> Image.Image:
    """What was drawn into it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _plotted(width: float, height: float, plot: Callable[[Any], object]) -> Image.Image:
    """What `plot` draws into matplotlib's axes."""
    figure = new_figure(width, height)
    plot(figure.add_subplot())
    return image_of(figure)


def _scatter(points: Tensor, caption: str) -> Image.Image:
    def plot(axes: Any) -> None:
        axes.scatter(*points.T.cpu().numpy(), s=6, alpha=0.6, linewidths=0, color="#2060a0")
        axes.set(xlim=(-POINTS_LIMIT, POINTS_LIMIT), ylim=(-POINTS_LIMIT, POINTS_LIMIT), aspect="equal")
        axes.set_xlabel(caption, fontsize=8)

    return _plotted(4, 4, plot)


def frames_of(steps: int) -> list[int]:
    """The steps, of so many, whose estimates a GIF shows: at most GIF_FRAMES_MAX, the last one among them."""
    return np.unique(np.linspace(0, steps - 1, GIF_FRAMES_MAX).round().astype(int)).tolist()


def trajectory(estimates: Sequence[Tensor], alpha_bars: Sequence[float], initial: Tensor) -> list[Tensor]:
    """Frames of noise becoming data: at most GIF_FRAMES_MAX, the last one the final estimate.

    estimates: x0 after every step; alpha_bars: of the timestep each was made at; initial: x_T. A frame is the estimate
    under the initial noise that is left at that step, sqrt(ab) x0 + sqrt(1 - ab) x_T.
    """
    picks = frames_of(len(estimates))
    noisy = [math.sqrt(alpha_bars[i]) * estimates[i] + math.sqrt(1 - alpha_bars[i]) * initial for i in picks]
    return [initial, *noisy, estimates[-1]]


def _with_palette(frame: Image.Image) -> Image.Image:
    """A frame of a GIF, whose pixels are there or not: transparent where less than half of one is, else on white."""
    if frame.mode != "RGBA":
        return frame.quantize(GIF_COLOURS, dither=Image.Dither.NONE)
    on_white = Image.alpha_composite(Image.new("RGBA", frame.size, PAPER), frame).convert("RGB")
    made = on_white.quantize(GIF_COLOURS, dither=Image.Dither.NONE)
    made.paste(GIF_COLOURS, mask=frame.getchannel("A").point(lambda opacity: 255 * (opacity < 128)))
    made.info["transparency"] = GIF_COLOURS
    return made


def save_gif(path: Path, frames: Iterable[Image.Image]) -> None:
    """A looping GIF that rests on its last frame."""
    first, *rest = map(_with_palette, frames)
    how = {"duration": [GIF_FRAME_MS] * len(rest) + [GIF_LAST_MS], "loop": 0}
    if "transparency" in first.info:
        how["disposal"] = 2  # a frame takes the place of the one before it
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=rest, **how)


def save_png(path: Path, picture: Image.Image) -> None:
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def png_bytes(values: np.ndarray) -> bytes:
    """A PNG file of uint8 or uint16 [h, w, C], C = 1, 3 or 4. Pillow writes no colour of 16 bits."""
    height, width, channels = values.shape
    header = struct.pack(">2I5B", width, height, 8 * values.itemsize, PNG_COLOURS[channels], 0, 0, 0)
    rows = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # a zero before each row: not filtered
    chunks = (b"IHDR" + header, b"IDAT" + data, b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def save_each(folder: Path, samples: Tensor, first_sample: int = 0, depth: int = 8) -> None:
    """Each image [n, C, H, W] as a PNG of its own, named by its global index; of FILES_AT_ONCE all or none."""
    for start in range(0, len(samples), FILES_AT_ONCE):
        part = samples[start : start + FILES_AT_ONCE]
        names = [folder / f"{first_sample + start + k:06d}.png" for k in range(len(part))]
        with replacing_all(names) as partials:
            for partial, sample in zip(partials, part, strict=True):
                partial.write_bytes(png_bytes(to_values(sample[None], depth)[0]))


def save_loss_plot(path: Path, epochs: Sequence[float], losses: Sequence[float]) -> None:
    """Mean training loss of each epoch, logarithmic."""

    def plot(axes: Any) -> None:
        axes.plot(epochs, losses, marker=".", color="#2060a0")
        axes.set(xlabel="epoch", ylabel="mean training loss", yscale="log")
        axes.grid(True, which="both", alpha=0.3)

    save_png(path, _plotted(6, 3.2, plot))
