"""`ddpm forward`: data becoming noise, as a picture."""

import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Option

from ddpm import forward as process
from ddpm.commands.sampling_options import check_output
from ddpm.data import IMAGE_SIZE, load_data, parse_range
from ddpm.errors import BadInput, check_integer
from ddpm.extras import need
from ddpm.schedule import KINDS, NoiseSchedule

PANELS = 10
COMPARED = ("linear", "quad", "sigmoid", "cosine")


def forward(
    out: Annotated[Path, Option(help="picture to write, .png")],
    data: Annotated[str, Option(help="digits, swiss-roll, images.npy, a folder of images, an idx file")] = "swiss-roll",
    schedule: Annotated[str, Option(help=", ".join(KINDS))] = "cosine",
    steps: Annotated[int, Option(help="T")] = 100,
    beta_start: Annotated[float | None, Option(help="first beta [1e-4]")] = None,
    beta_end: Annotated[float | None, Option(help="last beta [0.02]")] = None,
    n: Annotated[int | None, Option(help="points, or images in a panel [2000, or 4]")] = None,
    image_size: Annotated[str | None, Option(help=IMAGE_SIZE)] = None,
    value_range: Annotated[str | None, Option("--range", help="LO,HI: black and white, as in training")] = None,
    alpha: Annotated[bool, Option("--alpha", help="keep transparency as a fourth channel")] = False,
    seed: Annotated[int, Option(help="0 <= seed < 2^63")] = 0,
) -> None:
    """The Markov chain beside its closed form in ten panels each, and the schedules compared."""
    check_output(out, "--out", ".png")
    need("PIL", "matplotlib")
    from ddpm import figures, pictures

    bounds = None if value_range is None else parse_range(value_range)
    dataset = load_data(data, image_size=image_size, value_range=bounds, alpha=alpha)
    x0 = dataset.values
    if dataset.is_images and x0.shape[1] not in pictures.CHANNELS:
        raise BadInput(f"--data: {data} has {x0.shape[1]} channels, needs 1, 3 or 4")
    n = (4 if dataset.is_images else 2000) if n is None else n
    check_integer("--n", n)
    x0 = x0[:n]
    betas = {"beta_start": beta_start, "beta_end": beta_end}
    made = {schedule: NoiseSchedule.make(schedule, steps, **betas)}
    with warnings.catch_warnings():  # of the others, which nobody asked for
        warnings.simplefilter("ignore")
        made |= {kind: NoiseSchedule.make(kind, steps) for kind in COMPARED if kind != schedule}
    times = np.unique(np.linspace(0, steps, PANELS).round().astype(int)).tolist()
    rows = [("chain", process.chain(x0, made[schedule], times, seed))]
    rows += [("closed form", process.closed_form(x0, made[schedule], times, seed))]
    pictures.save_png(out, figures.forward_process(rows, times, made, schedule))
    print(f"wrote {out}")
