"""The run folder of a training run, which keeps its state over a kill at any moment."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import groupby
from pathlib import Path

from ddpm import runs
from ddpm.data import Dataset
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import read_tensors, write_tensors, write_text
from ddpm.training.engines import Trainer
from ddpm.training.options import TrainOptions

# A resumed run may find the same data elsewhere: the digest decides, not the path. Another engine changes rounding
# only; config.json keeps the one that the run began with.
MAY_DIFFER = {"data", "labels", "engine"}
# Options that runs from before there were others do not name.
LATER_OPTIONS = {"engine": "eager", "network": None}


class OtherData(BadInput):
    """Data that a run was not trained on."""


def resumed_options(folder: Path, asked: Mapping[str, object]) -> TrainOptions:
    """The options of the run in `folder`; what was `asked` for explicitly must agree. Raises BadInput."""
    config = folder / runs.CONFIG
    stored = runs.read_config(folder).get("training")
    if not isinstance(stored, dict):
        raise BadInput(f"{config}: no training options: an imported run cannot be resumed")
    stored = LATER_OPTIONS | stored
    odd = set(stored) ^ {field.name for field in fields(TrainOptions)}
    if odd:
        raise BadInput(f"{config}: training options do not fit this version: {', '.join(sorted(odd))}")
    for name, value in asked.items():
        if name not in MAY_DIFFER and stored[name] != value:
            raise BadInput(
                f"--{name.replace('_', '-')}: got {value}, but {folder} was started with {stored[name]}: "
                "resume without it, or start another run"
            )
    try:
        return TrainOptions(**stored | {name: asked[name] for name in MAY_DIFFER & set(asked)})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{config}: training options: {error}") from error


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
        training=asdict(options),
    )


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
    rows = [f"{epoch},{step},{loss:.6g},{lr:.6g}\n" for epoch, step, loss, lr in loss_table(trainer)]
    write_text(folder / runs.LOSS_CSV, "".join(["epoch,step,loss,lr\n", *rows]))


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
