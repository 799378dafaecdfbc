"""`ddpm sample`: run folder in, pictures out."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ddpm import pictures, runs
from ddpm.commands.sampling_options import (
    ALL,
    Clip,
    EngineName,
    Eta,
    Solver,
    Spacing,
    Steps,
    Variance,
    check_output,
    class_count,
    contexts_of,
    sample_run,
    table_of,
)
from ddpm.distributed import pick_device, world
from ddpm.errors import BadInput, check_integer
from ddpm.files import replacing
from ddpm.networks import sample_shape
from ddpm.noise import PhiloxNoise
from kernels import philox


def sample(
    run: Annotated[Path, typer.Argument(help="run folder")],
    n: Annotated[int, typer.Option(help="how many")] = 64,
    out: Annotated[Path | None, typer.Option(help="picture of all samples, .png")] = None,
    npy: Annotated[Path | None, typer.Option(help="samples as float32 [n, C, H, W], not clamped")] = None,
    gif: Annotated[Path | None, typer.Option(help="noise becoming pictures")] = None,
    context: Annotated[
        str | None, typer.Option(help="class by name or number, v1,v2,.., or all (sample k: class k % K)")
    ] = None,
    guidance: Annotated[float, typer.Option(help="w of classifier-free guidance, 1 = none")] = 1.0,
    solver: Solver = None,
    steps: Steps = None,
    eta: Eta = None,
    variance: Variance = None,
    clip: Clip = None,
    spacing: Spacing = None,
    seed: Annotated[int, typer.Option(help="0 <= seed < 2^63; the same seed gives the same pictures")] = 0,
    first_sample: Annotated[int, typer.Option(help="global index of the first sample")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="samples at a time; changes nothing else")] = None,
    columns: Annotated[int | None, typer.Option(help="of the picture [square, or one per class]")] = None,
    engine: EngineName = "auto",
    precision: Annotated[str, typer.Option(help="of the network: fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Sample a run. Sample k depends on (weights, solver and its options, seed, k) alone."""
    if out is npy is gif is None:
        raise BadInput("--out, --npy, --gif: got none, needs at least one to write")
    check_output(out, "--out", ".png")
    check_output(npy, "--npy", ".npy")
    check_output(gif, "--gif", ".gif")
    if columns is not None:
        check_integer("--columns", columns)
    opened = runs.load_run(run)
    target = pick_device(device)
    opened.model.to(target)
    asked = {"solver": solver, "steps": steps, "eta": eta, "variance": variance, "clip": clip, "spacing": spacing}
    options, table = table_of(opened, asked)
    with world(target) as ranks:
        if gif is not None and ranks.size > 1:
            raise BadInput(f"--gif: needs one process, got {ranks.size} ranks")
        check_integer("--n", n)
        images, estimates = sample_run(
            opened,
            n,
            contexts_of(opened, context, first_sample, n),
            table,
            ranks,
            first_sample=first_sample,
            batch_size=batch_size,
            keep=gif is not None,
            guidance=guidance,
            seed=seed,
            engine=engine,
            precision=precision,
        )
        if not ranks.is_main:
            return
    headers: tuple[str, ...] = ()
    if context == ALL:
        count = class_count(opened)
        columns = columns or count
        if columns == count:
            names = opened.classes or tuple(str(k) for k in range(count))
            headers = tuple(names[(first_sample + k) % count] for k in range(count))
    caption = _caption(options, table.steps, context, guidance, seed, first_sample)
    if out is not None:
        pictures.save_png(out, pictures.render(images, columns, headers, caption))
    if npy is not None:
        with replacing(npy) as partial:
            np.save(partial, images.numpy())
    if gif is not None:
        samples = torch.arange(first_sample, first_sample + n)
        noise = PhiloxNoise(seed)
        initial = noise(samples, 0, philox.Stream.INITIAL, sample_shape(opened.model))
        alpha_bars = [opened.schedule.alpha_bar(t) for t in table.timesteps.tolist()]
        frames = pictures.trajectory(estimates, alpha_bars, initial)
        cell = pictures.GIF_CELL_PIXELS
        pictures.save_gif(gif, [pictures.render(frame, columns, headers, caption, cell) for frame in frames])
    for path in (out, npy, gif):
        if path is not None:
            print(f"wrote {path}")


def _caption(options: dict, steps: int, context: str | None, guidance: float, seed: int, first_sample: int) -> str:
    parts = [f"{options['solver']}, {steps} steps"]
    if context not in (None, ALL):
        parts.append(f"context {context}")
    if guidance != 1.0:
        parts.append(f"guidance {guidance:g}")
    parts.append(f"seed {seed}")
    if first_sample:
        parts.append(f"from sample {first_sample}")
    return ", ".join(parts)
