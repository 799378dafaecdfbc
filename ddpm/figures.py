"""Plots of the process itself, by matplotlib: data becoming noise, and the field that leads back."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm.pictures import POINTS_LIMIT, image_of, new_figure, to_pixels
from ddpm.schedule import NoiseSchedule

BLUE, ORANGE, GREY = "#2060a0", "#c06020", "#404040"
OTHERS = (ORANGE, "#5a9e4b", "#9a6fb0", "#808080")  # than the chosen schedule
NOISE_LIMIT = 3.0
SIDE = 1.25  # inches of a panel
ARROWS = 20  # of the field, a side


def _show(axes: Any, x: Tensor, limit: float = POINTS_LIMIT, color: str = BLUE) -> None:
    """Points [n, 2] as dots, images [n, C, H, W] in a square."""
    axes.set(xticks=[], yticks=[])
    if x.ndim == 2:
        axes.scatter(*x.T.cpu().numpy(), s=1, alpha=0.4, linewidths=0, color=color)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        return
    side, own = math.ceil(math.sqrt(len(x))), to_pixels(x)
    _, height, width, channels = own.shape
    pixels = np.full((side * side, height, width, channels), 255, np.uint8)
    pixels[: len(x)] = own
    tiled = pixels.reshape(side, side, height, width, channels).swapaxes(1, 2)
    axes.imshow(tiled.reshape(side * height, side * width, channels), interpolation="nearest")


def forward_process(
    rows: Sequence[tuple[str, Sequence[Tensor]]], times: Sequence[int], schedules: dict[str, NoiseSchedule], chosen: str
) -> Image.Image:
    """Rows of panels, one a time, over alpha_bar and log SNR of schedules of the same T, of which one was chosen."""
    count = len(times)
    figure = new_figure(SIDE * count + 0.4, SIDE * len(rows) + 2.8)
    above, below = figure.subfigures(2, 1, height_ratios=[SIDE * len(rows) + 0.3, 2.5])
    grid = above.subplots(len(rows), count, squeeze=False)
    for line, (name, states) in zip(grid, rows, strict=True):
        for axes, x in zip(line, states, strict=True):
            _show(axes, x, limit=NOISE_LIMIT)
        line[0].set_ylabel(name, fontsize=8)
    for axes, t in zip(grid[0], times, strict=True):
        axes.set_title(f"t = {t}", fontsize=8)
    left, right = below.subplots(1, 2)
    colours = iter(OTHERS)
    for name, schedule in schedules.items():
        alpha_bars = schedule.alpha_bars.numpy()
        style = {"color": BLUE, "linewidth": 2, "zorder": 3} if name == chosen else {"color": next(colours)}
        steps = np.arange(1, len(alpha_bars))
        left.plot(np.arange(len(alpha_bars)), alpha_bars, label=name, **style)
        inner = alpha_bars[1:].clip(1e-12, 1 - 1e-12)
        right.plot(steps, np.log(inner / (1 - inner)), label=name, **style)
    for axes, name in ((left, r"$\bar\alpha_t$, the share of the data's variance"), (right, "log SNR")):
        axes.set_xlabel("t", fontsize=8)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
    right.legend(fontsize=7)
    return image_of(figure)


def grid_of_points(limit: float = POINTS_LIMIT) -> np.ndarray:
    """Where arrows stand: float32 [ARROWS^2, 2]."""
    line = np.linspace(-limit, limit, ARROWS, dtype=np.float32)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def score_fields(data: Tensor, samples: Tensor, fields: Sequence[tuple[int, Tensor, Tensor]]) -> Image.Image:
    """The data, the samples, and fields of (t, noisy data [n, 2], score [ARROWS^2, 2] on `grid_of_points`) in a row.

    An arrow points along the score; its length goes by the square root of the score's, the longest of a field as long
    as the arrows are apart.
    """
    panels = [("data", data), ("samples", samples)]
    figure = new_figure(2.6 * (len(panels) + len(fields)), 2.8)
    row = figure.subplots(1, len(panels) + len(fields))
    for axes, (name, x) in zip(row, panels, strict=False):
        _show(axes, x)
        axes.set_title(name, fontsize=9)
    places = grid_of_points()
    for axes, (t, noisy, field) in zip(row[len(panels) :], fields, strict=True):
        _show(axes, noisy, color=GREY)
        vectors = field.cpu().numpy()
        length = np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
        shown = 2 * POINTS_LIMIT / ARROWS * vectors / length * np.sqrt(length / length.max())
        how = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.0035, "headwidth": 3.5, "headlength": 4}
        axes.quiver(*places.T, *shown.T, color=ORANGE, **how)
        axes.set_title(f"score at t = {t}", fontsize=9)
    return image_of(figure)
