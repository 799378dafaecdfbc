"""Training into a run folder: checkpoints that survive a kill at any moment, and resuming from them."""

import csv
import io
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ddpm import runs
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import locked, read_tensors, write_tensors, write_text
from ddpm.progress import Bar
from ddpm.training import Trainer, TrainOptions
from ddpm.training_engines import make_trainer

# A resumed run may find the same data elsewhere: the digest decides, not the path. Another engine changes rounding
# only; config.json keeps the one that the run began with.
MAY_DIFFER = {"data", "labels", "engine"}
# Options that runs from before there were others do not name.
LATER = {"engine": "eager", "network": None}


class OtherData(BadInput):
    """Data that a run was not trained on."""


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.exit_code = 128 + number


class _Stop:
    """The first SIGINT or SIGTERM is remembered, a second SIGINT raises KeyboardInterrupt at once."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def _catching_signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resumed_options(folder: Path, asked: dict[str, object]) -> TrainOptions:
    """The options of the run in `folder`; what was `asked` for explicitly must agree. Raises BadInput."""
    stored = runs.read_config(folder).get("training")
    if not isinstance(stored, dict):
        raise BadInput(f"{folder / runs.CONFIG}: no training options: an imported run cannot be resumed")
    stored = LATER | stored
    known = {field.name for field in fields(TrainOptions)}
    if set(stored) != known:
        odd = ", ".join(sorted(set(stored) ^ known))
        raise BadInput(f"{folder / runs.CONFIG}: training options do not fit this version: {odd}")
    for name, value in asked.items():
        if name not in MAY_DIFFER and stored[name] != value:
            raise BadInput(
                f"--{name.replace('_', '-')}: got {value}, but {folder} was started with {stored[name]}: "
                "resume without it, or start another run"
            )
    try:
        return TrainOptions(**stored | {name: asked[name] for name in MAY_DIFFER & set(asked)})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{folder / runs.CONFIG}: training options: {error}") from error


def training_data(run: runs.Run, data: str | None = None, labels: str | None = None) -> Dataset:
    """The data that a run was trained on; data, labels: where they lie now, if not where they lay.

    Raises BadInput if the run knows none, if they cannot be read, or are not the same.
    """
    if not isinstance(run.config.get("training"), dict):
        raise BadInput(f"{run.folder / runs.CONFIG}: an imported run knows no training data to compare with")
    moved = {name: value for name, value in (("data", data), ("labels", labels)) if value is not None}
    dataset = replace(resumed_options(run.folder, {}), **moved).load_data()
    if dataset.digest() != run.config["data"]["digest"]:
        named = data or dataset.name
        raise OtherData(f"{run.folder}: was trained on other data than {named}, needs the same (--data, --labels)")
    return dataset


def make_config(trainer: Trainer) -> dict[str, object]:
    """The config.json of a training run: images are clipped while sampling, points are not."""
    options, dataset = trainer.options, trainer.dataset
    return runs.make_config(
        trainer.network,
        trainer.schedule,
        options.prediction,
        classes=dataset.classes,
        sampling={"clip": 1.0 if dataset.is_images else None},
        data={"name": dataset.name, "count": len(dataset), "digest": dataset.digest()},
        training={field.name: getattr(options, field.name) for field in fields(options)},
    )


def loss_table(trainer: Trainer) -> list[tuple[int, int, float, float]]:
    """(epoch, its last step so far, mean loss, learning rate) of every epoch begun."""
    losses = trainer.losses[: trainer.index].tolist()
    by_epoch: dict[int, list[float]] = {}
    for index, loss in enumerate(losses):
        by_epoch.setdefault(trainer.epoch_of(index), []).append(loss)
    table, step = [], 0
    for epoch, values in by_epoch.items():
        step += len(values)
        table.append((epoch + 1, step, sum(values) / len(values), trainer.learning_rate(step - 1)))
    return table


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Write the training state, the weights for sampling and loss.csv, each atomically, in this order.

    The state comes first: it holds the weights too, so a kill in between costs nothing. Raises WorkFailed if the loss
    is no longer finite; then the checkpoint before stays.
    """
    finite = trainer.losses[: trainer.index].isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise WorkFailed(f"loss is not finite since step {first + 1}: try a lower --lr or --clip-grad 1")
    write_tensors(folder / runs.TRAINING, trainer.state(), step=trainer.index)
    write_model(folder, trainer)


def write_model(folder: Path, trainer: Trainer) -> None:
    """What can be made from the training state: model.safetensors (the moving average) and loss.csv."""
    write_tensors(folder / runs.MODEL, trainer.ema.tensors, format_version=runs.FORMAT_VERSION, step=trainer.index)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("epoch", "step", "loss", "lr"))
    writer.writerows((e, s, f"{loss:.6g}", f"{lr:.6g}") for e, s, loss, lr in loss_table(trainer))
    write_text(folder / runs.LOSS_CSV, text.getvalue())


def open_folder(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the folder holds a checkpoint to resume from. Raises BadInput if it may not be written to."""
    runs.free_folder(folder, overwrite=resume or overwrite)
    if resume and (folder / runs.MODEL).exists() and not (folder / runs.TRAINING).exists():
        raise BadInput(f"{folder / runs.TRAINING}: is missing beside a model, needs --overwrite to start from zero")
    runs.make_folder(folder)
    return resume and (folder / runs.TRAINING).exists()


def resume_from(folder: Path, trainer: Trainer) -> None:
    """Load the training state of the folder. Raises BadInput if it is damaged or the data is not the same."""
    if runs.read_config(folder)["data"]["digest"] != trainer.dataset.digest():
        raise BadInput(f"{folder}: was trained on other data than {trainer.options.data}, needs the same to resume")
    trainer.load_state(read_tensors(folder / runs.TRAINING))


def fit(trainer: Trainer, folder: Path, save_every: float) -> None:
    """Run the trainer to its end, saving every `save_every` seconds, at the end, and on SIGINT or SIGTERM.

    Raises Interrupted after a signal, WorkFailed if the loss is not finite.
    """
    saved = time.monotonic()
    main = trainer.world.is_main
    size = trainer.options.batch_size
    unit = "images/s" if trainer.dataset.is_images else "points/s"
    with (
        _catching_signals() as stop,
        Bar("train", trainer.total, unit, size, trainer.index, quiet=not main) as bar,
    ):
        while not trainer.done:
            trainer.step()
            if bar.due(trainer.index):
                window = trainer.losses[max(0, trainer.index - 50) : trainer.index]
                bar.update(trainer.index, f"loss {float(window.mean()):.4f}")
            halt = trainer.world.any(bool(stop.number), trainer.device)
            if main and (trainer.done or halt or time.monotonic() - saved >= save_every):
                save_checkpoint(folder, trainer)
                saved = time.monotonic()
            if halt and not trainer.done:
                raise Interrupted(stop.number or signal.SIGTERM, trainer.index)


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
    Raises BadInput before anything is written, Interrupted and WorkFailed as `fit` does.
    """
    dataset = options.load_data() if dataset is None else dataset
    network = options.make_network(dataset) if network is None else network
    trainer = make_trainer(network, dataset, options.make_schedule(), options, device, world)
    with ExitStack() as held:
        continued = False
        if world.is_main:
            continued = open_folder(folder, resume, overwrite)
            held.enter_context(locked(folder))
        if world.any(continued, device):
            resume_from(folder, trainer)
        elif world.is_main:
            runs.start_run(folder, make_config(trainer))
        finished = trainer.done
        if not finished:
            fit(trainer, folder, save_every)
        elif world.is_main:
            # A kill may have come between the last training state and what is made from it.
            write_model(folder, trainer)
    return trainer, finished
