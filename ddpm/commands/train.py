"""`ddpm train`: data in, run folder out."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm import pictures, runs, training
from ddpm.distributed import pick_device, world
from ddpm.errors import BadInput
from ddpm.networks import NETWORKS
from ddpm.training import TrainOptions

DEFAULT = TrainOptions()


def _explicit(context: typer.Context, names: Sequence[str]) -> dict[str, Any]:
    """The parameters that stand on the command line, not those left at their defaults."""
    return {n: context.params[n] for n in names if context.get_parameter_source(n).name == "COMMANDLINE"}


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="run folder to make")],
    data: Annotated[str, typer.Option(help="digits, swiss-roll, images.npy, a folder of images, an idx file")] = (
        DEFAULT.data
    ),
    labels: Annotated[str | None, typer.Option(help="labels.npy (one-hot or integer) or an idx file")] = None,
    image_size: Annotated[int | None, typer.Option(help="crop to the central square, resize to this side")] = None,
    classes: Annotated[str | None, typer.Option(help="names of the classes, comma-separated")] = None,
    network: Annotated[str | None, typer.Option(help=f"{' or '.join(NETWORKS)} [by the data]")] = DEFAULT.network,
    n_feat: Annotated[int, typer.Option(help="width of the network")] = DEFAULT.n_feat,
    schedule: Annotated[str, typer.Option(help="linear, quad, sigmoid, constant, cosine or context_unet")] = (
        DEFAULT.schedule
    ),
    timesteps: Annotated[int, typer.Option(help="T")] = DEFAULT.timesteps,
    beta_start: Annotated[float | None, typer.Option(help="first beta [1e-4]")] = None,
    beta_end: Annotated[float | None, typer.Option(help="last beta [0.02]")] = None,
    prediction: Annotated[str, typer.Option(help="what the network outputs: eps, v or x0")] = DEFAULT.prediction,
    loss: Annotated[str, typer.Option(help="mse, l1 or huber")] = DEFAULT.loss,
    min_snr: Annotated[float, typer.Option(help="gamma of min-SNR weighting, 5 is usual, 0 = off")] = DEFAULT.min_snr,
    epochs: Annotated[int, typer.Option()] = DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="over all ranks")] = DEFAULT.batch_size,
    lr: Annotated[float, typer.Option(help="of Adam; falls linearly to 0")] = DEFAULT.lr,
    ema_decay: Annotated[float, typer.Option(help="of the averaged weights that are sampled")] = DEFAULT.ema_decay,
    context_dropout: Annotated[float, typer.Option(help="share trained without class, for guidance")] = (
        DEFAULT.context_dropout
    ),
    clip_grad: Annotated[float, typer.Option(help="gradient norm, 0 = off")] = DEFAULT.clip_grad,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast)")] = DEFAULT.precision,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the images")] = DEFAULT.flip,
    seed: Annotated[int, typer.Option(help="of weights, noise, order: 0 <= seed < 2^63")] = DEFAULT.seed,
    engine: Annotated[str, typer.Option(help="eager, compile (warms up first) or graph (CUDA)")] = DEFAULT.engine,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
) -> None:
    """Train a run folder. Ctrl-C saves; --resume goes on, bit for bit as if nothing had happened."""
    names = [field.name for field in fields(TrainOptions)]
    if resume and overwrite:
        raise BadInput("--resume, --overwrite: got both, needs at most one")
    if not save_every > 0:
        raise BadInput(f"--save-every: got {save_every}, needs seconds > 0")
    if resume and (out / runs.CONFIG).exists():
        options = training.resumed_options(out, _explicit(context, names))
    else:
        options = TrainOptions(**{name: context.params[name] for name in names})
    target = pick_device(device)
    with world(target) as ranks:
        try:
            trainer, finished = training.train(
                options, out, device=target, world=ranks, resume=resume, overwrite=overwrite, save_every=save_every
            )
        except training.Interrupted as stopped:
            if ranks.is_main:
                print(f"{stopped}, saved; go on with: ddpm train --out {out} --resume")
            raise typer.Exit(stopped.exit_code) from None
        if ranks.is_main:
            table = training.loss_table(trainer)
            pictures.save_loss_plot(out / runs.LOSS_PNG, [row[0] for row in table], [row[2] for row in table])
            verb = "finished before" if finished else "trained"
            print(f"{verb}: {out} ({trainer.total} steps, loss of the last epoch {table[-1][2]:.4f})")
            print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")
