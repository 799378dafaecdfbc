"""`ddpm score`: data, samples and the score's field of a run for points, as a picture."""

from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from ddpm import runs
from ddpm.commands import sampling_options as given
from ddpm.distributed import World, pick_device
from ddpm.errors import BadInput, check_integer
from ddpm.extras import need
from ddpm.forward import closed_form
from ddpm.networks.protocol import sample_shape
from ddpm.training import training_data

SHARES = (0.02, 0.2, 0.5)  # of T, where the field is shown by default


def score(
    run: Annotated[Path, Argument(help="run folder, for points in the plane")],
    out: Annotated[Path, Option(help="picture to write, .png")],
    n: Annotated[int, Option(help="how many samples")] = 2000,
    t: Annotated[str | None, Option(help="timesteps of the fields, comma-separated [2, 20 and 50% of T]")] = None,
    solver: given.Solver = None,
    steps: given.Steps = None,
    seed: Annotated[int, Option(help="0 <= seed < 2^63")] = 0,
    engine: given.EngineName = "auto",
    device: given.Device = "auto",
) -> None:
    """Draw the training data, samples, and the score that the network has learned at some timesteps."""
    from ddpm.score import score as score_of

    given.check_output(out, "--out", ".png")
    need("PIL", "matplotlib", "sklearn")
    from ddpm import figures, pictures

    opened = runs.load_run(run)
    if sample_shape(opened.model) != (2,):
        raise BadInput(f"{run}: has samples of shape {list(sample_shape(opened.model))}, needs points in the plane [2]")
    check_integer("--n", n)
    times = _times(t, opened.schedule.timesteps)
    opened.model.to(pick_device(device))
    data = training_data(opened).values
    _, table = given.table_of(opened, {"solver": solver, "steps": steps})
    samples, _ = given.sample_run(opened, n, None, table, World(), seed=seed, engine=engine)
    places = torch.from_numpy(figures.grid_of_points()).to(next(opened.model.parameters()).device)
    prediction = opened.config["prediction"]
    fields = [
        (time, noisy, score_of(opened.model, opened.schedule, places, time, prediction=prediction))
        for time, noisy in zip(times, closed_form(data[:n], opened.schedule, times, seed), strict=True)
    ]
    pictures.save_png(out, figures.score_fields(data[:n], samples, fields))
    print(f"wrote {out}")


def _times(text: str | None, count: int) -> list[int]:
    if text is None:
        return sorted({max(1, round(share * count)) for share in SHARES})
    try:
        times = sorted({int(word) for word in text.split(",")})
    except ValueError:
        times = [0]
    if not 1 <= times[0] <= times[-1] <= count:
        raise BadInput(f"--t: got {text!r}, needs timesteps in 1..{count}, comma-separated")
    return times
