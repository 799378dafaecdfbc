"""What people look at: labelled grids, trajectory GIFs, scatter plots, loss curves."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.files import replacing

# Small images are enlarged by a whole factor to at most this side; moving noise costs bytes, so GIFs are smaller.
CELL_PIXELS, GIF_CELL_PIXELS = 64, 48
GAP, MARGIN = 4, 10
INK, PAPER, FRAME = "#202020", "#ffffff", "#d0d0d0"
GIF_FRAME_MS, GIF_LAST_MS = 60, 2500
GIF_FRAMES_MAX, GIF_COLOURS = 40, 128
POINTS_LIMIT = 2.5


def to_pixels(images: Tensor) -> np.ndarray:
    """[n, C, H, W] in [-1, 1], clamped -> uint8 [n, H, W, 3]."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def render(
    samples: Tensor, columns: int | None = None, headers: Sequence[str] = (), caption: str = "", cell: int = CELL_PIXELS
) -> Image.Image:
    """A picture of samples: a grid of images [n, C, H, W] or a scatter plot of points [n, 2].

    columns defaults to a square grid; headers name the columns; caption stands below; cell is the side of an image.
    """
    if samples.ndim == 2:
        return _scatter(samples, caption)
    pixels = to_pixels(samples)
    n, height, width = pixels.shape[:3]
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, cell // height)
    size = 14 if cell >= CELL_PIXELS else 10
    font = ImageFont.load_default(size)
    cell_w, cell_h = width * scale + GAP, height * scale + GAP
    top = MARGIN + (size + GAP if headers else 0)
    bottom = MARGIN + (size + 2 * GAP if caption else 0)
    wide = columns * cell_w - GAP
    if caption:
        wide = max(wide, math.ceil(font.getlength(caption)))
    canvas = Image.new("RGB", (wide + 2 * MARGIN, rows * cell_h - GAP + top + bottom), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, header in enumerate(headers[:columns]):
        text = _shorten(header, font, cell_w - 2)
        draw.text((MARGIN + column * cell_w + (cell_w - GAP) // 2, MARGIN + size - 2), text, INK, font, anchor="ms")
    for k in range(n):
        x, y = MARGIN + k % columns * cell_w, top + k // columns * cell_h
        tile = Image.fromarray(pixels[k]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=FRAME)
        canvas.paste(tile, (x, y))
    if caption:
        draw.text((MARGIN, canvas.height - MARGIN), caption, INK, font, anchor="lb")
    return canvas


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    shown, end = text, ""
    while shown and font.getlength(shown + end) > width:
        shown, end = shown[:-1], "…"
    return shown + end


def _plotted(width: float, height: float, plot: Callable[[Any], object]) -> Image.Image:
    """What `plot` draws into matplotlib's axes."""
    from matplotlib.figure import Figure  # imported only where it is used

    figure, buffer = Figure(figsize=(width, height), dpi=120, layout="constrained"), io.BytesIO()
    plot(figure.add_subplot())
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _scatter(points: Tensor, caption: str) -> Image.Image:
    def plot(axes: Any) -> None:
        axes.scatter(*points.T.cpu().numpy(), s=6, alpha=0.6, linewidths=0, color="#2060a0")
        axes.set(xlim=(-POINTS_LIMIT, POINTS_LIMIT), ylim=(-POINTS_LIMIT, POINTS_LIMIT), aspect="equal")
        axes.set_xlabel(caption, fontsize=8)

    return _plotted(4, 4, plot)


def trajectory(estimates: Sequence[Tensor], alpha_bars: Sequence[float], initial: Tensor) -> list[Tensor]:
    """Frames of noise becoming data: at most GIF_FRAMES_MAX, the last one the final estimate.

    estimates: x0 after every step; alpha_bars: of the timestep each was made at; initial: x_T. A frame is the estimate
    under the initial noise that is left at that step, sqrt(ab) x0 + sqrt(1 - ab) x_T.
    """
    picks = np.unique(np.linspace(0, len(estimates) - 1, GIF_FRAMES_MAX).round().astype(int))
    noisy = [math.sqrt(alpha_bars[i]) * estimates[i] + math.sqrt(1 - alpha_bars[i]) * initial for i in picks]
    return [initial, *noisy, estimates[-1]]


def save_gif(path: Path, frames: Sequence[Image.Image]) -> None:
    """A looping GIF that rests on its last frame."""
    durations = [GIF_FRAME_MS] * (len(frames) - 1) + [GIF_LAST_MS]
    first, *rest = [frame.quantize(GIF_COLOURS, dither=Image.Dither.NONE) for frame in frames]
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def save_png(path: Path, picture: Image.Image) -> None:
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def save_loss_plot(path: Path, epochs: Sequence[float], losses: Sequence[float]) -> None:
    """Mean training loss of each epoch, logarithmic."""

    def plot(axes: Any) -> None:
        axes.plot(epochs, losses, marker=".", color="#2060a0")
        axes.set(xlabel="epoch", ylabel="mean training loss", yscale="log")
        axes.grid(True, which="both", alpha=0.3)

    save_png(path, _plotted(6, 3.2, plot))
