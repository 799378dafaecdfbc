"""`ddpm train`: data in, run folder out."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm import runs, training
from ddpm.command_line import typed
from ddpm.distributed import pick_device, world
from ddpm.errors import BadInput
from ddpm.extras import need
from ddpm.training import TrainOptions


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="run folder to make")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
    **given: Any,
) -> None:
    """Train a run folder. Ctrl-C saves; --resume goes on, bit for bit as if nothing had happened."""
    need("PIL", "matplotlib", extra="train")
    from ddpm import pictures

    if resume and overwrite:
        raise BadInput("--resume, --overwrite: got both, needs at most one")
    if not save_every > 0:
        raise BadInput(f"--save-every: got {save_every}, needs seconds > 0")
    if resume and (out / runs.CONFIG).exists():
        options = training.resumed_options(out, {name: given[name] for name in typed(context) if name in given})
        if "trainer" in runs.read_config(out):
            raise BadInput(f"{out}: was begun by a program with ddpm.Trainer, needs that program to go on")
    else:
        options = TrainOptions(**given)
    target = pick_device(device)

    def plot(trainer: training.Trainer) -> None:
        epochs, _, losses, _ = zip(*training.loss_table(trainer), strict=True)
        pictures.save_loss_plot(out / runs.LOSS_PNG, epochs, losses)

    how = {"device": target, "resume": resume, "overwrite": overwrite, "save_every": save_every}
    with world(target) as ranks:
        try:
            trainer, finished = training.train(options, out, world=ranks, finish=plot, **how)
        except training.Interrupted as stopped:
            if ranks.is_main:
                print(f"{stopped}, saved; go on with: ddpm train --out {out} --resume")
            raise typer.Exit(stopped.exit_code) from None
        if ranks.is_main:
            verb, (*_, last) = "finished before" if finished else "trained", training.loss_table(trainer)
            print(f"{verb}: {out} ({trainer.total} steps, loss of the last epoch {last[2]:.4f})")
            print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")


# `given` are the fields of TrainOptions, which say what their options are called and for.
_context, _out, *_more, _given = inspect.signature(train).parameters.values()
_options = inspect.signature(TrainOptions).parameters.values()
train.__signature__ = inspect.Signature([_context, _out, *_options, *_more])
