"""`ddpm edit`: a picture in, pictures like it, or with its masked part made anew, out."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from typer import Argument, Option

from ddpm import runs
from ddpm.commands import sampling_options as given
from ddpm.distributed import World, pick_device
from ddpm.editing import edit as edited
from ddpm.editing import rest_of
from ddpm.errors import BadInput, check_integer
from ddpm.extras import need
from ddpm.files import write_array
from ddpm.networks import sample_shape
from ddpm.schedule import NoiseSchedule
from kernels.q_sample import pixels_to_unit


@given.takes_table_options
def edit(
    run: Annotated[Path, Argument(help="run folder")],
    image: Annotated[Path, Argument(help="picture of the run's size")],
    n: Annotated[int, Option(help="how many")] = 8,
    out: Annotated[Path | None, Option(help="picture of all, .png")] = None,
    npy: Annotated[Path | None, Option(help="the same as float32 [n, C, H, W], not clamped")] = None,
    strength: Annotated[float | None, Option(help="share of T that is sampled again [0.6; 1 with --mask]")] = None,
    mask: Annotated[Path | None, Option(help="picture, white where pixels are made anew; black ones stay")] = None,
    context: Annotated[str | None, Option(help="class by name or number, v1,v2,.., or all")] = None,
    guidance: given.Weights = "1",
    negative: given.Negative = None,
    guidance_rescale: given.Rescale = 0.0,
    seed: Annotated[int, Option(help="0 <= seed < 2^63")] = 0,
    first_sample: Annotated[int, Option(help="global index of the first sample")] = 0,
    columns: Annotated[int | None, Option(help="of the picture [square]")] = None,
    engine: given.EngineName = "auto",
    precision: given.Precision = "fp32",
    device: given.Device = "auto",
    **asked: Any,
) -> None:
    """Sample a run from the middle, beginning with a picture; with a mask its black part stays exactly as it is."""
    if out is npy is None:
        raise BadInput("--out, --npy: got none, needs at least one to write")
    for path, option, suffix in ((out, "--out", ".png"), (npy, "--npy", ".npy")):
        given.check_output(path, option, suffix)
    check_integer("--n", n)
    if columns is not None:
        check_integer("--columns", columns)
    need("PIL")
    from ddpm import pictures

    opened = runs.load_run(run)
    shape = sample_shape(opened.model)
    if len(shape) != 3 or shape[0] not in pictures.CHANNELS:
        raise BadInput(f"{run}: has samples {list(shape)}, needs images of 1, 3 or 4 channels")
    known = torch.from_numpy(read_as(image, shape))
    area = None if mask is None else _mask(mask, shape)
    opened.model.to(pick_device(device))
    options, table = given.table_of(opened, asked)
    strength = (0.6 if mask is None else 1.0) if strength is None else strength
    part = rest_of(table, opened.schedule, strength)
    contexts = given.contexts_of(opened, context, first_sample, n)
    guided = (guidance, negative, guidance_rescale, asked["guidance_interval"])
    how, told = given.guided_by(opened, n, first_sample, *guided)

    def draw(model: nn.Module, schedule: NoiseSchedule, count: int, **more: Any) -> Tensor:
        return edited(model, schedule, known, count, strength=strength, mask=area, **more)

    more = how | {"first_sample": first_sample, "seed": seed, "engine": engine, "precision": precision}
    images, _ = given.sample_run(opened, n, contexts, part, World(), draw=draw, **more)
    caption = f"strength {strength:g}, {options['solver']}, {part.steps} of {table.steps} steps"
    caption += f", context {context}" if context not in (None, given.ALL) else ""
    caption += f"{told}, seed {seed}"
    if out is not None:
        pictures.save_png(out, pictures.render(images, columns, (), caption))
        print(f"wrote {out}")
    if npy is not None:
        write_array(npy, images.numpy())
        print(f"wrote {npy}")


def read_as(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A picture as float32 [C, H, W] in [-1, 1]. Raises BadInput for one of another size or kind."""
    from ddpm.image_files import read_picture

    values, _ = read_picture(path, None, None, shape[0] == 4)
    height, width, channels = values.shape
    if (height, width) != shape[1:]:
        needs = f"needs {shape[1]}x{shape[2]}, what the run samples (height x width)"
        raise BadInput(f"{path}: is {height}x{width}, {needs}")
    if channels > shape[0]:
        raise BadInput(f"{path}: has {channels} channels, needs {shape[0]}, what the run samples")
    unit = pixels_to_unit(torch.from_numpy(values.copy())).to(torch.float32)
    return unit.permute(2, 0, 1).expand(shape).contiguous().numpy()


def _mask(path: Path, shape: tuple[int, ...]) -> Tensor:
    """[1, H, W], 1 where pixels are made anew."""
    return torch.from_numpy((read_as(path, (3, *shape[1:])).mean(0, keepdims=True) > 0).astype(np.int64))
