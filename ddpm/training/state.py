"""The state of a training run: its tensors, and the run folder that keeps them over a kill at any moment."""

import csv
import io
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddpm import runs
from ddpm.data import Dataset
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import read_tensors, write_tensors, write_text
from ddpm.training.options import TrainOptions

if TYPE_CHECKING:
    from ddpm.training.engines import Trainer

ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")
# A resumed run may find the same data elsewhere: the digest decides, not the path. Another engine changes rounding
# only; config.json keeps the one that the run began with.
MAY_DIFFER = {"data", "labels", "engine"}
# Options that runs from before there were others do not name.
LATER_OPTIONS = {"engine": "eager", "network": None}


class OtherData(BadInput):
    """Data that a run was not trained on."""


class Ema:
    """Moving average of weights and BatchNorm statistics with decay min(d, (1 + k) / (10 + k)) at update k."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, k: int | Tensor) -> None:
        """k: an integer, or a scalar tensor on the network's device, which is then not read on the host."""
        averages, values = [], []
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                values.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        if isinstance(k, Tensor):
            share = 1 - ((1 + k) / (10 + k)).clamp(max=self.decay)
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(averages, steps)
        else:
            torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + k) / (10 + k)))


class TrainingState:
    """Everything that the rest of a run depends on: network, moving average, Adam's moments, losses, steps done."""

    network: nn.Module
    optimizer: torch.optim.Adam
    ema: Ema
    losses: Tensor
    index: int

    def state(self) -> dict[str, Tensor]:
        """It by name: `network.*`, `ema.*`, `adam.*`, losses, step."""
        state = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        for name, parameter in self.network.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"adam.{name}.{key}"] = tensor
        return state | {"losses": self.losses, "step": torch.tensor(self.index)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`. Raises BadInput if it is of another run."""
        try:
            self._load_state(state)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"training state does not fit this network or data: {reason}") from error

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict({name: state[f"network.{name}"] for name in self.network.state_dict()})
        for name, tensor in self.ema.tensors.items():
            tensor.copy_(state[f"ema.{name}"])
        for name, parameter in self.network.named_parameters():
            moments = {key: state[f"adam.{name}.{key}"] for key in ADAM_KEYS if f"adam.{name}.{key}" in state}
            if moments:
                step = moments.pop("step").to(parameter.device if self.optimizer.defaults["fused"] else "cpu")
                # In the parameters' memory layout, which files do not keep and fused Adam takes for granted.
                moved = {key: torch.empty_like(parameter).copy_(tensor) for key, tensor in moments.items()}
                self.optimizer.state[parameter] = {"step": step, **moved}
        self.losses.copy_(state["losses"])
        self.index = int(state["step"])


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


def make_config(trainer: "Trainer") -> dict[str, object]:
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


def loss_table(trainer: "Trainer") -> list[tuple[int, int, float, float]]:
    """(epoch, its last step so far, mean loss, learning rate) of every epoch begun."""
    by_epoch: dict[int, list[float]] = {}
    for index, loss in enumerate(trainer.losses[: trainer.index].tolist()):
        by_epoch.setdefault(trainer.epoch_of(index), []).append(loss)
    table, step = [], 0
    for epoch, values in by_epoch.items():
        step += len(values)
        table.append((epoch + 1, step, sum(values) / len(values), trainer.learning_rate(step - 1)))
    return table


def save_checkpoint(folder: Path, trainer: "Trainer") -> None:
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


def write_model(folder: Path, trainer: "Trainer") -> None:
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


def resume_from(folder: Path, trainer: "Trainer") -> None:
    """Load the training state of the folder. Raises BadInput if it is damaged or the data is not the same."""
    if runs.read_config(folder)["data"]["digest"] != trainer.dataset.digest():
        raise BadInput(f"{folder}: was trained on other data than {trainer.options.data}, needs the same to resume")
    trainer.load_state(read_tensors(folder / runs.TRAINING))
