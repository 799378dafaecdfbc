"""Run folders: what training leaves and sampling reads.

config.json           network, schedule, prediction, data, training options, sampling defaults
model.safetensors     the weights that sampling uses (the moving average, or imported ones)
training.safetensors  the training state, for --resume
loss.csv, loss.png    one row per epoch, and its plot
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.errors import BadInput
from ddpm.files import json_text, read_json, read_tensors, replacing_all, tensor_bytes
from ddpm.networks import build_network, fit_state_dict
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import make_table

FORMAT_VERSION = 1
CONFIG, MODEL, TRAINING, LOSS_CSV, LOSS_PNG = (
    "config.json",
    "model.safetensors",
    "training.safetensors",
    "loss.csv",
    "loss.png",
)
SAMPLING_DEFAULTS = {
    "solver": "ddpm",
    "steps": None,
    "eta": 0.0,
    "variance": "posterior",
    "clip": None,
    "spacing": "trailing",
}


def make_config(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction: str,
    *,
    classes: Sequence[str] = (),
    weights: str = "ema",
    sampling: Mapping[str, object] | None = None,
    **more: object,
) -> dict[str, Any]:
    """The content of config.json. `sampling` overrides SAMPLING_DEFAULTS; `more` is kept as given."""
    return {
        "format_version": FORMAT_VERSION,
        "model": network.config(),
        "schedule": schedule.config(),
        "prediction": prediction,
        "classes": list(classes),
        "weights": weights,
        "sampling": SAMPLING_DEFAULTS | dict(sampling or {}),
        **more,
    }


FILES = (CONFIG, MODEL, TRAINING, LOSS_CSV, LOSS_PNG)


def free_folder(folder: Path, overwrite: bool = False) -> None:
    """Raise BadInput unless a new run may be written there: no file, and no run's files without `overwrite`."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file, needs a folder")
    found = next((name for name in FILES if (folder / name).exists()), None)
    if found is not None and not overwrite:
        raise BadInput(
            f"{folder}: already holds a run ({found}), needs --resume (of training), --overwrite or another --out"
        )


def make_folder(folder: Path) -> None:
    """Create the folder and see that it can be written to. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error}), needs a writable folder") from error


def start_run(folder: Path, config: Mapping[str, object], network: nn.Module | None = None) -> None:
    """Make the folder this run's: config.json, and the network's weights if there are any yet.

    What an earlier run left goes when the new files are whole on the disk, so that no mixture can be read.
    """
    contents = {CONFIG: json_text(config).encode()}
    if network is not None:
        contents[MODEL] = tensor_bytes(network.state_dict(), format_version=FORMAT_VERSION)
    stale = [folder / name for name in FILES]
    with replacing_all([folder / name for name in contents], stale) as partials:
        for partial, content in zip(partials, contents.values(), strict=True):
            partial.write_bytes(content)


@dataclass(frozen=True, eq=False)
class Run:
    """A trained (or imported) model with all that sampling it needs.

    Sample it with `sample(run.model, run.schedule, n, **run.sampling)`.
    """

    folder: Path
    config: dict[str, Any]
    model: nn.Module
    schedule: NoiseSchedule

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def sampling(self) -> dict[str, Any]:
        """The run's sampling options, prediction included, as keyword arguments of `sample`."""
        return {**self.config["sampling"], "prediction": self.config["prediction"]}

    def context(self, text: str) -> Tensor:
        """One context vector, float32 [n_cfeat]: a class by name or number, or `v1,v2,..`.

        Raises BadInput for anything else.
        """
        n_cfeat = self.model.n_cfeat
        if n_cfeat == 0:
            raise BadInput(f"--context: got {text!r}, but {self.folder} was trained without classes")
        names = self.classes
        if text in names:
            return torch.eye(n_cfeat)[names.index(text)]
        known = f"a class ({', '.join(names)})" if names else f"a class in 0..{n_cfeat - 1}"
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            raise BadInput(f"--context: got {text!r}, needs {known} or {n_cfeat} numbers") from None
        if len(numbers) == 1 and n_cfeat > 1:
            if not text.isdecimal() or int(text) >= n_cfeat:
                raise BadInput(f"--context: got {text!r}, needs {known}, 0..{n_cfeat - 1} or {n_cfeat} numbers")
            return torch.eye(n_cfeat)[int(text)]
        vector = torch.tensor(numbers)
        if len(numbers) != n_cfeat or not vector.isfinite().all():
            raise BadInput(f"--context: got {len(numbers)} numbers ({text}), needs {n_cfeat} finite ones")
        return vector


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.json, checked for what every reader needs. Raises BadInput."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    path = folder / CONFIG
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: format_version {config.get('format_version')!r}, needs {FORMAT_VERSION}")
    kinds = {"model": dict, "schedule": dict, "prediction": str, "classes": list, "sampling": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise BadInput(f"{path}: {key!r} is {config.get(key)!r}, needs a {kind.__name__}")
    if not all(isinstance(name, str) for name in config["classes"]):
        raise BadInput(f"{path}: 'classes' is {config['classes']}, needs names")
    data = config.get("data")
    if "training" in config and not (isinstance(data, dict) and isinstance(data.get("digest"), str)):
        raise BadInput(f"{path}: 'data' has no digest, which a trained run needs")
    config["sampling"] = SAMPLING_DEFAULTS | config["sampling"]
    return config


def build(folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, NoiseSchedule]:
    """Network (untrained) and schedule of a config; its sampling defaults must make a table. Raises BadInput."""
    try:
        network = build_network(config["model"])
        schedule = NoiseSchedule.make(**config["schedule"])
        make_table(schedule, **config["sampling"], prediction=config["prediction"])
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{folder / CONFIG}: {reason}") from error
    if len(config["classes"]) not in (0, network.n_cfeat):
        raise BadInput(f"{folder / CONFIG}: {len(config['classes'])} classes, its network needs {network.n_cfeat}")
    return network, schedule


def load_run(folder: str | Path) -> Run:
    """The run in a folder, its model on the CPU in eval mode. Raises BadInput if anything is missing or damaged."""
    folder = Path(folder)
    config = read_config(folder)
    network, schedule = build(folder, config)
    path = folder / MODEL
    if not path.exists():
        raise BadInput(f"{path}: no such file: training has not saved yet (ddpm train --out {folder} --resume)")
    try:
        fit_state_dict(network, read_tensors(path))
    except ValueError as error:
        raise error if isinstance(error, BadInput) else BadInput(f"{path}: {error}") from error
    return Run(folder, config, network.eval(), schedule)
