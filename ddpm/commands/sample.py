"""`ddpm sample`: run folder in, pictures out."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from typer import Argument, Option

from ddpm import runs
from ddpm.commands import sampling_options as given
from ddpm.data import DEPTHS
from ddpm.distributed import pick_device, world
from ddpm.errors import BadInput, check_integer
from ddpm.extras import need
from ddpm.files import write_array
from ddpm.networks import sample_shape
from ddpm.noise import PhiloxNoise
from kernels import philox

IN_A_ROW = 10  # of the way between two seeds
CONTEXT = "class by name or number, v1,v2,.., or all (sample k: class k % K)"


def from_one_to_another(seeds: tuple[int, int], n: int, shape: tuple[int, ...], sample: int = 0) -> Tensor:
    """n initial noises [n, *shape] on the great circle between those of a sample of two seeds (Shoemake 1985)."""
    numbers = torch.tensor([sample], device="cpu")
    one, other = (PhiloxNoise(seed)(numbers, 0, philox.Stream.INITIAL, shape).double() for seed in seeds)
    angle = torch.acos(((one * other).sum() / (one.norm() * other.norm())).clamp(-1, 1))  # of one seed twice 1 + 2e-16
    share = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu").reshape(-1, *(1,) * len(shape))
    if angle == 0:
        return one.float().expand(n, *shape)
    return ((((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()).float()


@given.takes_table_options
def sample(
    run: Annotated[Path, Argument(help="run folder")],
    n: Annotated[int, Option(help="how many")] = 64,
    out: Annotated[Path | None, Option(help="picture of all samples, .png")] = None,
    npy: Annotated[Path | None, Option(help="samples as float32 [n, C, H, W], not clamped")] = None,
    png_dir: Annotated[Path | None, Option(help="folder for a .png of each sample, named by its global index")] = None,
    depth: Annotated[int | None, Option(help="bits a channel in --png-dir, 8 or 16 [the run's]")] = None,
    gif: Annotated[Path | None, Option(help="noise becoming pictures")] = None,
    context: Annotated[str | None, Option(help=CONTEXT)] = None,
    guidance: given.Weights = "1",
    negative: given.Negative = None,
    guidance_rescale: given.Rescale = 0.0,
    seed: Annotated[int, Option(help="0 <= seed < 2^63; the same seed gives the same pictures")] = 0,
    between: Annotated[tuple[int, int] | None, Option(help="two seeds: from one's first sample to the other's")] = None,
    first_sample: Annotated[int, Option(help="global index of the first sample")] = 0,
    batch_size: Annotated[int | None, Option(help="samples at a time; changes nothing else")] = None,
    columns: Annotated[int | None, Option(help="of the picture [square, one per class, a row]")] = None,
    engine: given.EngineName = "auto",
    precision: given.Precision = "fp32",
    device: given.Device = "auto",
    **asked: Any,
) -> None:
    """Sample a run. Sample k depends on (weights, solver and its options, seed, k) alone."""
    if out is npy is gif is png_dir is None:
        raise BadInput("--out, --npy, --gif, --png-dir: got none, needs at least one to write")
    for path, option, suffix in ((out, "--out", ".png"), (npy, "--npy", ".npy"), (gif, "--gif", ".gif")):
        given.check_output(path, option, suffix)
    if png_dir is not None:
        given.check_output_folder(png_dir, "--png-dir")
    if depth is not None and (png_dir is None or depth not in DEPTHS):
        raise BadInput(f"--depth: got {depth}, needs 8 or 16, and --png-dir, whose pictures it is of")
    if columns is not None:
        check_integer("--columns", columns)
        if out is gif is None:
            raise BadInput(f"--columns: got {columns} without a picture of all samples, needs --out or --gif")
    opened = runs.load_run(run)
    shape = sample_shape(opened.model)
    if out or gif or png_dir:
        need("PIL", *(() if len(shape) == 3 else ("matplotlib",)))
        from ddpm import pictures

        if len(shape) == 3 and shape[0] not in pictures.CHANNELS:
            raise BadInput(f"--out, --gif, --png-dir: samples have {shape[0]} channels, needs 1, 3 or 4 (or use --npy)")
        if len(shape) != 3 and png_dir is not None:
            raise BadInput(f"--png-dir: samples are of shape {list(shape)}, needs images")
    target = pick_device(device)
    opened.model.to(target)
    options, table = given.table_of(opened, asked)
    if between is not None and any(table.noisy) and asked["solver"] is None:
        warnings.warn(f"--between: {options['solver']} adds noise at each step, ddim takes its place", stacklevel=1)
        options, table = given.table_of(opened, asked | {"solver": "ddim"})
    more = {"first_sample": first_sample, "batch_size": batch_size, "seed": seed}
    more |= {"engine": engine, "precision": precision}
    if between is not None:
        if any(table.noisy):
            raise BadInput(f"--between: {options['solver']} adds noise at each step, needs ddim (eta 0) or dpmpp_2m")
        check_integer("--n", n, 2)
        more["x_T"] = from_one_to_another(between, n, shape, first_sample)
        columns = columns or min(n, IN_A_ROW)
    with world(target) as ranks:
        if gif is not None and ranks.size > 1:
            raise BadInput(f"--gif: needs one process, got {ranks.size} ranks")
        check_integer("--n", n)
        contexts = given.contexts_of(opened, context, first_sample, n)
        guided = (guidance, negative, guidance_rescale, asked["guidance_interval"])
        how, told = given.guided_by(opened, n, first_sample, *guided)
        images, estimates = given.sample_run(opened, n, contexts, table, ranks, keep=gif is not None, **how, **more)
        if not ranks.is_main:
            return
    headers: list[str] = []
    if context == given.ALL and (out or gif):
        count = given.class_count(opened)
        columns = columns or count
        if columns == count:
            names, numbers = opened.classes or range(count), given.cycled_classes(opened, first_sample, count)
            headers = [pictures.header_of(str(names[k]), k) for k in numbers.tolist()]
    caption = f"{options['solver']}, {table.steps} steps"
    caption += f", context {context}" if context not in (None, given.ALL) else ""
    seeds = f"seed {seed}" if between is None else f"from seed {between[0]} to {between[1]}"
    caption += f"{told}, {seeds}" + (f", from sample {first_sample}" if first_sample else "")
    if out is not None:
        pictures.save_png(out, pictures.render(images, columns, headers, caption))
    if npy is not None:
        write_array(npy, images.numpy())
    if gif is not None:
        initial = more.get("x_T")
        if initial is None:
            samples = torch.arange(first_sample, first_sample + n)
            initial = PhiloxNoise(seed)(samples, 0, philox.Stream.INITIAL, shape)
        alpha_bars = [opened.schedule.alpha_bar(t) for t in table.timesteps[pictures.frames_of(len(table))].tolist()]
        frames = pictures.trajectory(estimates, alpha_bars, initial)
        cell = pictures.GIF_CELL_PIXELS
        pictures.save_gif(gif, (pictures.render(frame, columns, headers, caption, cell) for frame in frames))
    if png_dir is not None:
        png_dir.mkdir(exist_ok=True)
        pictures.save_each(png_dir, images, first_sample, depth or opened.depth)
    for path in (out, npy, gif):
        if path is not None:
            print(f"wrote {path}")
    if png_dir is not None:
        others = sum(1 for _ in png_dir.iterdir()) - n
        print(f"wrote {n} pictures into {png_dir}" + (f", which holds {others} other files" if others else ""))
