"""The training loop: step until done, saving from time to time, at the end and when a signal stops it."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ddpm import runs
from ddpm.command_line import handling
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.files import locked
from ddpm.progress import Bar
from ddpm.training import state
from ddpm.training.engines import Trainer, make_trainer
from ddpm.training.options import TrainOptions


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.exit_code = 128 + number


def run(trainer: Trainer, folder: Path, save_every: float) -> None:
    """Step to the end, saving every `save_every` seconds, at the end, and on SIGINT or SIGTERM.

    Raises Interrupted after a signal, KeyboardInterrupt at once after a second SIGINT, WorkFailed if the loss is not
    finite.
    """
    saved, stopped_by = time.monotonic(), 0
    main = trainer.world.is_main
    size = trainer.options.batch_size
    unit = "images/s" if trainer.dataset.is_images else "points/s"

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        if stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped_by = number

    bar = Bar("train", trainer.total, unit, size, trainer.index, quiet=not main)
    with handling(stop, signal.SIGINT, signal.SIGTERM), bar:
        while not trainer.done:
            trainer.step()
            if bar.due(trainer.index):
                window = trainer.losses[max(0, trainer.index - 50) : trainer.index]
                bar.update(trainer.index, f"loss {float(window.mean()):.4f}")
            halt = trainer.world.any(bool(stopped_by), trainer.device)
            if main and (trainer.done or halt or time.monotonic() - saved >= save_every):
                state.save_checkpoint(folder, trainer)
                saved = time.monotonic()
            if halt and not trainer.done:
                raise Interrupted(stopped_by or signal.SIGTERM, trainer.index)


def train(
    options: TrainOptions,
    folder: Path,
    *,
    device: torch.device,
    world: World,
    resume: bool = False,
    overwrite: bool = False,
    save_every: float = 60.0,
    dataset: Dataset | None = None,
    network: nn.Module | None = None,
) -> tuple[Trainer, bool]:
    """Train a run into a folder, or continue it; returns the finished trainer and whether it was finished before.

    dataset, network: instead of those that the options name; the network's class needs a name (`@network`).
    Raises BadInput before anything is written, Interrupted and WorkFailed as `run` does.
    """
    dataset = options.load_data() if dataset is None else dataset
    network = options.make_network(dataset) if network is None else network
    trainer = make_trainer(network, dataset, options.make_schedule(), options, device, world)
    with ExitStack() as held:
        continued = False
        if world.is_main:
            continued = state.open_folder(folder, resume, overwrite)
            held.enter_context(locked(folder))
        if world.any(continued, device):
            state.resume_from(folder, trainer)
        elif world.is_main:
            runs.start_run(folder, state.make_config(trainer))
        finished = trainer.done
        if not finished:
            run(trainer, folder, save_every)
        elif world.is_main:
            # A kill may have come between the last training state and what is made from it.
            state.write_model(folder, trainer)
    return trainer, finished
