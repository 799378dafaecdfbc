"""Run folders: what training leaves and sampling reads.

config.json           network, schedule, prediction, data, training options, sampling defaults
model.safetensors     the weights that sampling uses (the moving average, or imported ones)
training.safetensors  the training state, for --resume
loss.csv, loss.png    one row per epoch, and its plot

config.json and the two files of tensors carry the run's id, so that files of two runs are not taken for one.
"""

import hashlib
import math
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.data import DEPTHS
from ddpm.errors import BadInput, first_line
from ddpm.files import (
    digest_of,
    json_text,
    locked,
    read_json,
    read_noted,
    replacing_all,
    tensor_bytes,
    warn_if_unchecked,
)
from ddpm.networks.protocol import (
    build_network,
    check_state_dict,
    condition_shape,
    fit_state_dict,
    name_of,
    one_hot_conditions,
)
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import SOLVERS, carried_over, given, make_table, options_of

FORMAT_VERSION = 2
FILES = ("config.json", "model.safetensors", "training.safetensors", "loss.csv", "loss.png")
CONFIG, MODEL, TRAINING, LOSS_CSV, LOSS_PNG = FILES
# What `ddpm-export` makes of a run, by default or with --out RUN: another run's would lie beside this one's files.
EXPORTS = ("denoiser.pt2", "denoiser.aoti.pt2", "denoiser.onnx", "sampler.onnx", "step.onnx", "manifest.json")
READS = 3  # of a run that is being replaced: its files may be those of two
SAMPLING_DEFAULTS = {"solver": "ddpm", "steps": None, "clip": None}
# Format 1 wrote these whatever the solver took.
FORMER_DEFAULTS = {"eta": 0.0, "variance": "posterior", "spacing": "trailing"}


def make_config(
    network: nn.Module, schedule: NoiseSchedule, prediction: str, *, classes: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """The content of config.json; `more` is kept (sampling beside its defaults).

    Its run_id is a digest of all this and of the network's weights: the same run, made again, is the same bytes. Raises
    ValueError for a network without name, or if no table can be made to sample it.
    """
    described = {"format_version": FORMAT_VERSION, "network": name_of(network), "model": network.config()}
    described |= {"schedule": schedule.config(), "prediction": prediction, "classes": list(classes)}
    more = {"weights": "ema", "sampling": {}} | more
    described |= more | {"sampling": SAMPLING_DEFAULTS | more["sampling"]}
    make_table(schedule, **given(described["sampling"]), prediction=prediction)
    text = json_text(described) + digest_of(network.state_dict())
    return described | {"run_id": hashlib.sha256(text.encode()).hexdigest()[:16]}


def free_folder(folder: Path, overwrite: bool = False) -> None:
    """Raise BadInput if the folder, `held`, has a run's files and not `overwrite`."""
    found = next((name for name in (*FILES, *EXPORTS) if (folder / name).exists()), None)
    if found is not None and not overwrite:
        needs = "--resume (of training), --overwrite or another --out"
        raise BadInput(f"{folder}: already holds a run ({found}), needs {needs}")


def make_folder(folder: Path) -> list[Path]:
    """Create the folder and see that it can be written to; returns the folders that were made. Raises BadInput."""
    try:
        str(folder).encode()
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder}: is a file, needs a folder")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except UnicodeEncodeError:
        raise BadInput(f"{str(folder)!a}: is no name in UTF-8, needs one") from None
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error}), needs a writable folder") from error
    return made


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # something is in it
            path.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only process that writes to the folder, from before it is looked at until everything is written.

    The folder is made if it is missing, and removed if nothing comes of it. Raises BadInput if it cannot be written to
    or if another process has it.
    """
    with ExitStack() as locks:
        made = make_folder(folder)
        try:
            while not locks.enter_context(locked(folder)):
                made = make_folder(folder)
        except BadInput as error:
            if not isinstance(error.__cause__, BlockingIOError):  # no file system for locks: nobody else has it
                _remove_empty(made)
            raise
        try:
            yield
        except BaseException:
            # Before the lock goes: nobody else can have begun to write there.
            _remove_empty(made)
            raise


def held_beside(path: Path) -> AbstractContextManager[None]:
    """`held` for a file that is made of a run and lies in its folder; in other folders nothing is held."""
    return held(path.parent) if (path.parent / CONFIG).exists() else nullcontext()


def start_run(folder: Path, config: Mapping[str, object], network: nn.Module | None = None) -> None:
    """Make the folder this run's: what an earlier one left goes when the new files are whole on the disk."""
    contents = {CONFIG: json_text(config).encode()}
    if network is not None:
        more = {"format_version": FORMAT_VERSION, "run_id": config.get("run_id")}
        contents[MODEL] = tensor_bytes(network.state_dict(), **more)
    stale = [folder / name for name in (*FILES, *EXPORTS)]
    with replacing_all([folder / name for name in contents], stale) as partials:
        for partial, content in zip(partials, contents.values(), strict=True):
            partial.write_bytes(content)


@dataclass(frozen=True, eq=False)
class Run:
    """What sampling needs: `sample(run.model, run.schedule, n, **run.options(solver="ddim", steps=20))`."""

    folder: Path
    config: dict[str, Any]
    model: nn.Module
    schedule: NoiseSchedule

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def depth(self) -> int:
        """Bits a channel of its pictures: what training was asked for, else 8."""
        options = self.config.get("training")
        depth = options.get("depth") if isinstance(options, dict) else None
        return depth if depth in DEPTHS else DEPTHS[0]

    @property
    def sampling(self) -> dict[str, Any]:
        """The run's sampling options, prediction included, as keyword arguments of `sample`; None = not given."""
        return self.config["sampling"] | {"prediction": self.config["prediction"]}

    def options(self, **asked: object) -> dict[str, Any]:
        """`sampling`, overridden by what is asked for (None = not asked), see `ddpm.solvers.carried_over`."""
        return carried_over(self.sampling, asked)

    def check_present(self) -> None:
        """Raise BadInput if another run has taken its place in the folder since it was loaded."""
        if read_config(self.folder) != self.config:
            raise BadInput(f"{self.folder}: another run has taken its place meanwhile, needs another try")

    def digest(self) -> str:
        """The digest of the model's present weights, see `ddpm.files.digest_of`."""
        return digest_of(self.model.state_dict())

    def context(self, text: str, option: str = "--context") -> Tensor:
        """One condition, float32 [*condition_shape]: a class by name or number, or all its numbers.

        Raises BadInput naming the option that it comes from.
        """
        # Names of former runs may have accents as macOS stores them.
        text, *names = (unicodedata.normalize("NFC", name) for name in (text, *self.classes))
        shape = condition_shape(self.model)
        if shape is None:
            raise BadInput(f"{option}: got {text!r}, but {self.folder} was trained without classes")
        size, number = math.prod(shape), None
        if text in names:
            number = names.index(text)
        elif len(shape) == 1 and text.isdecimal() and len(text) <= 9 and int(text) < size:
            number = int(text)
        if number is not None:
            return one_hot_conditions(self.model, torch.tensor([number]))[0]
        known = f"a class ({', '.join(names)})" if names else f"a class in 0..{size - 1}"
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            raise BadInput(f"{option}: got {text!r}, needs {known} or {size} numbers") from None
        if len(shape) == 1 and (text.isdecimal() or (len(numbers) == 1 and size > 1)):
            raise BadInput(f"{option}: got {text!r}, needs {known}, 0..{size - 1} or {size} numbers")
        vector = torch.tensor(numbers)
        if len(numbers) != size or not vector.isfinite().all():
            raise BadInput(f"{option}: got {len(numbers)} numbers ({text}), needs {size} finite ones")
        return vector.reshape(shape)


def taken_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options of a former version, which also stored defaults and what the solver does not take."""
    solver = options.get("solver", SAMPLING_DEFAULTS["solver"])
    known = isinstance(solver, str) and solver in SOLVERS
    taken = {"spacing", *options_of(solver)} if known else set(FORMER_DEFAULTS)
    dropped = {name for name, default in FORMER_DEFAULTS.items() if name not in taken or options.get(name) == default}
    return {name: value for name, value in options.items() if name not in dropped}


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.json, checked for what every reader needs. Raises BadInput."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    path = folder / CONFIG
    config = read_json(path)
    if config.get("format_version") == 1:
        config["format_version"] = FORMAT_VERSION
        if isinstance(config.get("model"), dict):
            config["network"] = config["model"].pop("kind", None)
        if isinstance(config.get("sampling"), dict):
            config["sampling"] = taken_options(config["sampling"])
    if config.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: format_version {config.get('format_version')!r}, needs 1 or {FORMAT_VERSION}")
    kinds = {"network": str, "model": dict, "schedule": dict, "prediction": str, "classes": list, "sampling": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise BadInput(f"{path}: {key!r} is {config.get(key)!r}, needs a {kind.__name__}")
    config["sampling"] = SAMPLING_DEFAULTS | config["sampling"]
    if not isinstance(config["sampling"]["solver"], str):
        raise BadInput(f"{path}: its solver is {config['sampling']['solver']!r}, needs a name")
    if not all(isinstance(name, str) for name in config["classes"]):
        raise BadInput(f"{path}: 'classes' is {config['classes']}, needs names")
    if not isinstance(config.get("run_id"), str | None):
        raise BadInput(f"{path}: 'run_id' is {config['run_id']!r}, needs a text")
    data = config.get("data")
    if "training" in config and not (isinstance(data, dict) and isinstance(data.get("digest"), str)):
        raise BadInput(f"{path}: 'data' has no digest, which a trained run needs")
    return config


def is_of_run(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether tensors with this metadata belong to the config. Other programs' have none, former versions no run_id."""
    return not metadata or metadata.get("run_id") == config.get("run_id")


def _weightless(config: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_network(config["network"], config["model"])
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        # A constructor that reads its tensors, which then need memory.
        return build_network(config["network"], config["model"])


def outline(folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, NoiseSchedule]:
    """(network without memory for its weights, schedule) of a config, from which a table can be made, or BadInput."""
    try:
        network = _weightless(config)
        schedule = NoiseSchedule.make(**config["schedule"])
        make_table(schedule, **given(config["sampling"]), prediction=config["prediction"])
    except Exception as error:  # constructors raise nearly anything on what they were not made for
        raise BadInput(f"{folder / CONFIG}: {first_line(error)}") from error
    shape = condition_shape(network) or (0,)
    if len(config["classes"]) not in (0, math.prod(shape)):
        raise BadInput(f"{folder / CONFIG}: {len(config['classes'])} classes, its network needs {math.prod(shape)}")
    return network, schedule


def load_run(folder: str | Path) -> Run:
    """The run in a folder, its model on the CPU in eval mode. Raises BadInput if anything is missing or damaged."""
    folder = Path(folder)
    path = folder / MODEL
    for _ in range(READS):
        config = read_config(folder)
        if not path.exists() and not path.is_symlink():
            trained = "training has not saved yet (ddpm train --out {} --resume)"
            missing = trained if "training" in config else "its import did not end (ddpm import --out {} --overwrite)"
            raise BadInput(f"{path}: no such file: {missing.format(folder)}")
        tensors, metadata = read_noted(path)
        if is_of_run(config, metadata):
            break
    else:
        raise BadInput(f"{path}: is of another run than {CONFIG} beside it, needs both of one")
    network, schedule = outline(folder, config)
    try:
        # The file bounds what is allocated, whatever the config says.
        check_state_dict(network, tensors)
        with torch.device("cpu"):  # whatever the process's default is
            network = build_network(config["network"], config["model"])
        fit_state_dict(network, tensors)
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise BadInput(f"{path}: {reason} (the network is that of {CONFIG})") from error
    warn_if_unchecked(path, metadata)
    return Run(folder, config, network.eval(), schedule)
