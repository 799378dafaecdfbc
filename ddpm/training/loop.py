"""The training loop, and the run folder that keeps its state over a kill at any moment."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ddpm import runs
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.errors import BadInput, WorkFailed, first_line
from ddpm.files import digest_of, json_text, read_noted, warn_if_unchecked, write_tensors, write_text
from ddpm.interrupts import handling
from ddpm.networks.protocol import build_network, condition_shape, network_for, sample_shape
from ddpm.progress import Bar
from ddpm.sizes import asked_sides
from ddpm.solvers import given
from ddpm.training.engines import Trainer, make_trainer
from ddpm.training.options import OF_NETWORKS, TrainOptions, stored_size

# A resumed run may find the same data elsewhere: the digest decides, not the path. Another engine changes rounding
# only; config.json keeps the one that the run began with.
MAY_DIFFER = {"data", "labels", "engine"}
# Options that runs from before there were others do not name.
LATER_OPTIONS = {"engine": "eager", "network": None, "range": None, "alpha": False, "init": None, "depth": None}
LATER_OPTIONS |= dict.fromkeys(OF_NETWORKS)


class OtherData(BadInput):
    """Data that a run was not trained on."""


def resumed_options(folder: Path, asked: Mapping[str, object]) -> TrainOptions:
    """The options of the run in `folder`; what was `asked` for explicitly must agree. Raises BadInput."""
    config, content = folder / runs.CONFIG, runs.read_config(folder)
    stored = content.get("training")
    if not isinstance(stored, dict):
        raise BadInput(f"{config}: no training options: an imported run cannot be resumed")
    former = "range" not in stored  # it took every number up to the largest for a class
    stored = LATER_OPTIONS | stored
    odd = set(stored) ^ {field.name for field in fields(TrainOptions)}
    if odd:
        raise BadInput(f"{config}: training options do not fit this version: {', '.join(sorted(odd))}")
    if former and stored["labels"] and stored["classes"] is None:
        stored["classes"] = ",".join(content["classes"])
    if "image_size" in asked:
        asked = {**asked, "image_size": stored_size(asked["image_size"])}
    for name, value in asked.items():
        if name not in MAY_DIFFER and stored[name] != value:
            started = f"{folder} was started with {stored[name]}: resume without it, or start another run"
            raise BadInput(f"--{name.replace('_', '-')}: got {value}, but {started}")
    try:
        return TrainOptions(**stored | {name: asked[name] for name in MAY_DIFFER & set(asked)})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{config}: training options: {error}") from error


def training_data(run: runs.Run, data: str | None = None, labels: str | None = None) -> Dataset:
    """What a run was trained on; data, labels: where they lie now. Raises BadInput if it knows none or they differ."""
    if not isinstance(run.config.get("training"), dict):
        raise BadInput(f"{run.folder / runs.CONFIG}: an imported run knows no training data to compare with")
    options = replace(resumed_options(run.folder, {}), **given({"data": data, "labels": labels}))
    dataset = options.load_data()
    if dataset.digest() != run.config["data"]["digest"]:
        raise OtherData(f"{run.folder}: {_other(options)} (--data, --labels)")
    return dataset


def _other(options: TrainOptions) -> str:
    labels = f" with {options.labels}" if options.labels else ""
    return f"was trained on other data than {options.data}{labels}, needs the same"


def make_config(trainer: Trainer) -> dict[str, object]:
    """The config.json of a training run: images are clipped while sampling, points are not."""
    options, dataset = trainer.options, trainer.dataset
    more = {"data": {"name": dataset.name, "count": len(dataset), "digest": dataset.digest()}}
    more |= {"sampling": {"clip": 1.0 if dataset.is_images else None}, "training": asdict(options)} | trainer.more
    if options.init is not None:
        more |= {"init": {"run": options.init, "digest": digest_of(trainer.network.state_dict())}}
    return runs.make_config(trainer.network, trainer.schedule, options.prediction, classes=dataset.classes, **more)


def loss_table(trainer: Trainer) -> list[tuple[int, int, float, float]]:
    """(epoch, its last step so far, mean loss, learning rate) of every epoch begun."""
    losses, table = trainer.losses.tolist(), []
    for epoch, indices in groupby(range(trainer.index), trainer.epoch_of):
        own = [(index, losses[index]) for index in indices]
        mean, last = sum(loss for _, loss in own) / len(own), own[-1][0]
        table.append((epoch + 1, last + 1, mean, trainer.learning_rate(last)))
    return table


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Write the training state, the weights for sampling and loss.csv, each atomically, in this order.

    The state holds the weights too, so a kill in between costs nothing. Raises WorkFailed, before anything is replaced,
    if the loss or a tensor is not finite.
    """
    finite = trainer.losses[: trainer.index].isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise WorkFailed(f"loss is not finite since step {first + 1}: try a lower --lr or --clip-grad 1")
    state = trainer.state()
    for name, tensor in state.items():
        if name != "losses" and not tensor.isfinite().all():
            raise WorkFailed(f"{name} is not finite at step {trainer.index}: try a lower --lr or --clip-grad 1")
    write_tensors(folder / runs.TRAINING, state, step=trainer.index, run_id=trainer.run_id)
    write_model(folder, trainer)


def write_model(folder: Path, trainer: Trainer) -> None:
    """What can be made from the training state: model.safetensors (the moving average) and loss.csv."""
    more = {"format_version": runs.FORMAT_VERSION, "step": trainer.index, "run_id": trainer.run_id}
    write_tensors(folder / runs.MODEL, trainer.ema.tensors, **more)
    rows = [f"{epoch},{step},{loss:.6g},{lr:.6g}\n" for epoch, step, loss, lr in loss_table(trainer)]
    write_text(folder / runs.LOSS_CSV, "".join(["epoch,step,loss,lr\n", *rows]))


def open_folder(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the folder, `held`, has a checkpoint to resume from. Raises BadInput if it may not be written to."""
    runs.free_folder(folder, overwrite=resume or overwrite)
    if resume and (folder / runs.MODEL).exists() and not (folder / runs.TRAINING).exists():
        raise BadInput(f"{folder / runs.TRAINING}: is missing beside a model, needs --overwrite to start from zero")
    return resume and (folder / runs.TRAINING).exists()


def make_network(options: TrainOptions, dataset: Dataset, folder: Path, resume: bool) -> nn.Module:
    """The network to train, freshly initialised or of the run `options.init`, which a resumed run needs no more."""
    if options.init is not None and resume and (folder / runs.TRAINING).exists():
        config = runs.read_config(folder)
        runs.outline(folder, config)  # what is wrong with it is told there
        return build_network(config["network"], config["model"])
    if options.init is not None and Path(options.init).resolve() == folder.resolve():
        raise BadInput(f"--init: got {options.init}, which is --out, needs another folder")
    return options.make_network(dataset)


def check_options(folder: Path, options: TrainOptions) -> None:
    """Raise BadInput unless a run's training options make the network and the schedule that its config.json has.

    Before either, or the data, cost time or memory.
    """
    config, path = runs.read_config(folder), folder / runs.CONFIG
    network, schedule = runs.outline(folder, config)
    try:
        pairs = [(schedule, options.make_schedule())]
        if options.init is None:
            shape, condition = sample_shape(network), condition_shape(network)
            if options.image_size is not None and asked_sides(options.image_size) != shape[1:]:
                raise ValueError(f"image_size {options.image_size}, its network is for samples {list(shape)}")
            with torch.device("meta"):
                classes = math.prod(condition or (0,))
                made = network_for(options.network, shape, classes, options.n_feat, **options.of_network())
            pairs.append((network, made))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise BadInput(f"{path}: its training options are no run's: {first_line(error)}") from error
    _check_same(path, pairs)


def _check_same(config: Path, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Of what config.json has and what its training options make."""
    if any(json_text(stored.config()) != json_text(made.config()) for stored, made in pairs):
        needs = "one run's: they make another network or schedule than its training options"
        raise BadInput(f"{config}: 'model' and 'schedule', needs {needs}")


def resume_from(folder: Path, trainer: Trainer) -> None:
    """Load the training state of the folder. Raises BadInput if it is damaged, or of another run or other data."""
    resumed_options(folder, asdict(trainer.options))
    config, path = runs.read_config(folder), folder / runs.TRAINING
    if config["data"]["digest"] != trainer.dataset.digest():
        raise BadInput(f"{folder}: {_other(trainer.options)} to resume")
    pairs = zip(runs.outline(folder, config), (trainer.network, trainer.schedule), strict=True)
    _check_same(folder / runs.CONFIG, pairs)
    state, metadata = read_noted(path)
    if not runs.is_of_run(config, metadata):
        raise BadInput(f"{path}: training state does not fit {runs.CONFIG} beside it: it is of another run")
    try:
        trainer.load_state(state)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    warn_if_unchecked(path, metadata)
    trainer.run_id = config.get("run_id")


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.exit_code = 128 + number


def run(trainer: Trainer, folder: Path, save_every: float) -> None:
    """Step to the end, saving every `save_every` seconds, at the end, and on SIGINT or SIGTERM: Interrupted.

    A second SIGINT raises KeyboardInterrupt at once. Raises WorkFailed if the loss is not finite.
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
                save_checkpoint(folder, trainer)
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
    make: Callable[..., Trainer] = make_trainer,
    finish: Callable[[Trainer], object] | None = None,
) -> tuple[Trainer, bool]:
    """Train a run into a folder, or continue it; returns the finished trainer and whether it was finished before.

    dataset, network: instead of those that the options name; the network's class needs a name (`@network`). make: what
    makes the trainer, called as `make_trainer` is.
    finish: what the main process calls at the end, to write more into the folder while no other may.
    Raises BadInput before anything is written, Interrupted and WorkFailed as `run` does.
    """
    with runs.held(folder) if world.is_main else nullcontext():
        continued = world.is_main and open_folder(folder, resume, overwrite)
        if continued and network is None:
            check_options(folder, options)
        dataset = options.load_data() if dataset is None else dataset
        network = make_network(options, dataset, folder, resume) if network is None else network
        trainer = make(network, dataset, options, device, world)
        if world.any(continued, device):
            resume_from(folder, trainer)
        elif world.is_main:
            config = make_config(trainer)
            runs.start_run(folder, config)
            trainer.run_id = config["run_id"]
        finished = trainer.done
        if not finished:
            run(trainer, folder, save_every)
        elif world.is_main:
            # A kill may have come between the last training state and what is made from it.
            write_model(folder, trainer)
        if finish is not None and world.is_main:
            finish(trainer)
    return trainer, finished
