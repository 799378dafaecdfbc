"""What a training run may be asked for."""

import math
import re
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, get_args, get_type_hints

import torch
from torch import nn
from typer import Option
from typer.models import OptionInfo

from ddpm.data import IMAGE_SIZE, Dataset, load_data, parse_range
from ddpm.errors import BadInput, first_line
from ddpm.networks.protocol import NETWORKS, condition_shape, name_of, network_for, own_options, sample_shape
from ddpm.runs import load_run
from ddpm.schedule import NoiseSchedule
from ddpm.sizes import asked_sides, short
from ddpm.solvers import given
from ddpm.table import FLOAT32_MAX, PREDICTIONS
from kernels import philox

ENGINES = ("eager", "compile", "graph")
CHOICES = {"loss": ("mse", "l1", "huber"), "precision": ("fp32", "bf16"), "prediction": PREDICTIONS, "engine": ENGINES}
BATCH_MAX = 1 << 20  # untuned; beyond it a single batch is hundreds of epochs of what fits into memory
RANGES = {"epochs": (1, math.inf), "batch_size": (1, BATCH_MAX), "min_snr": (0, FLOAT32_MAX)}
RANGES |= {"clip_grad": (0, FLOAT32_MAX)}
RANGES |= {"ema_decay": (0, 1), "context_dropout": (0, 1), "seed": (0, philox.SEED_LIMIT - 1)}
OF_NETWORKS = ("multipliers", "time_dim", "self_condition", "attn_heads", "attn_dim_head")
# Arguments of networks by the option that they come from.
ASKED = {name: name for name in ("network", "n_feat", *OF_NETWORKS)}
ASKED |= {"dim": "n_feat", "height": "image_size", "image_size": "image_size"}
MULTIPLIERS = re.compile(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5}){0,15}")
KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}


def _own(name: str, about: str, *flags: str) -> OptionInfo:
    """An option that some networks have, listed under their names."""
    takers = ", ".join(network for network, kind in NETWORKS.items() if name in own_options(kind))
    return Option(*flags, help=about, rich_help_panel=f"Options of {takers}")


def stored_size(size: object) -> int | str | None:
    """An `image_size` as config.json has it: 16, "24x16" or None. Raises BadInput."""
    return None if size is None else short(asked_sides(size))


@dataclass(frozen=True)
class TrainOptions:
    """All that a training run was asked for; stored in config.json, compared by --resume, the options of `ddpm train`.

    See `load_data` and `NoiseSchedule`; engine (`ddpm.training.engines`) changes results by rounding only. Raises
    BadInput for values of another type or out of range.
    """

    data: Annotated[str, Option(help="digits, swiss-roll, images.npy, a folder of images, an idx file")] = "digits"
    labels: Annotated[str | None, Option(help="labels.npy (integers, one-hot, any numbers) or an idx file")] = None
    image_size: Annotated[str | None, Option(help=IMAGE_SIZE)] = None
    classes: Annotated[str | None, Option(help="names of the classes, comma-separated")] = None
    range: Annotated[str | None, Option(help="LO,HI: black and white in other than 8 or 16 bits")] = None
    alpha: Annotated[bool, Option("--alpha", help="keep transparency as a fourth channel")] = False
    depth: Annotated[int | None, Option(help="bits of a channel, of data and --png-dir: 8 or 16 [all, and 8]")] = None
    network: Annotated[str | None, Option(help=f"{' or '.join(NETWORKS)} [by the data]")] = None
    n_feat: Annotated[int, Option(help="width of the network")] = 64
    multipliers: Annotated[str | None, _own("multipliers", "width of each level by --n-feat, as 1,2,4")] = None
    time_dim: Annotated[int | None, _own("time_dim", "sines and cosines of the time [64]")] = None
    self_condition: Annotated[bool | None, _own("self_condition", "takes its last x0, too", "--self-condition")] = None
    attn_heads: Annotated[int | None, _own("attn_heads", "heads of attention [4]")] = None
    attn_dim_head: Annotated[int | None, _own("attn_dim_head", "width of a head [32]")] = None
    init: Annotated[str | None, Option(help="run with whose weights training begins")] = None
    schedule: Annotated[str, Option(help="linear, quad, sigmoid, constant, cosine or context_unet")] = "linear"
    timesteps: Annotated[int, Option(help="T")] = 500
    beta_start: Annotated[float | None, Option(help="first beta [1e-4]")] = None
    beta_end: Annotated[float | None, Option(help="last beta [0.02]")] = None
    prediction: Annotated[str, Option(help="what the network outputs: eps, v or x0")] = "eps"
    loss: Annotated[str, Option(help="mse, l1 or huber")] = "mse"
    min_snr: Annotated[float, Option(help="gamma of min-SNR weighting, 5 is usual, 0 = off")] = 0.0
    epochs: Annotated[int, Option()] = 30
    batch_size: Annotated[int, Option(help="over all ranks")] = 100
    lr: Annotated[float, Option(help="of Adam; falls linearly to 0")] = 1e-3
    ema_decay: Annotated[float, Option(help="of the averaged weights that are sampled")] = 0.999
    context_dropout: Annotated[float, Option(help="share trained without class, for guidance")] = 0.1
    clip_grad: Annotated[float, Option(help="gradient norm, 0 = off")] = 1.0
    precision: Annotated[str, Option(help="fp32 or bf16 (autocast)")] = "fp32"
    flip: Annotated[bool, Option("--flip", help="mirror half of the images")] = False
    seed: Annotated[int, Option(help="of weights, noise, order: 0 <= seed < 2^63")] = 0
    engine: Annotated[str, Option(help="eager, compile (warms up first) or graph (CUDA)")] = "eager"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", stored_size(self.image_size))
        for name, kind in (get_type_hints(TrainOptions) | {"image_size": int | str | None}).items():
            value, kinds = getattr(self, name), get_args(kind) or (kind,)
            kinds += (int,) if float in kinds else ()
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                needs = " or ".join(KINDS[each] for each in get_args(kind) or (kind,))
                raise BadInput(f"--{name.replace('_', '-')}: got {value!r}, needs {needs}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                bounds = f"{low}..{high}" if low == 0 and high < FLOAT32_MAX else f">= {low}"
                bounds += f" and <= {high}" if bounds[0] == ">" and high < math.inf else ""
                raise BadInput(f"--{name.replace('_', '-')}: got {value}, needs {bounds}")
        if not 0 < self.lr <= FLOAT32_MAX:
            raise BadInput(f"--lr: got {self.lr}, needs a finite rate > 0 that float32 holds")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(f"--{name}: got {getattr(self, name)!r}, needs one of {', '.join(known)}")
        if self.multipliers is not None and not MULTIPLIERS.fullmatch(self.multipliers):
            raise BadInput(f"--multipliers: got {self.multipliers!r}, needs 1..16 integers >= 1, comma-separated")
        if not self.data:
            raise BadInput("--data: got an empty text, needs digits, swiss-roll, a file or a folder")

    def load_data(self) -> Dataset:
        names = None if self.classes is None else self.classes.split(",")
        bounds = None if self.range is None else parse_range(self.range)
        more = {"value_range": bounds, "alpha": self.alpha, "depth": self.depth}
        # Of a network that has none, whatever it is made for, its class says so.
        more["conditions"] = getattr(NETWORKS.get(self.network), "condition_shape", ()) is not None
        return load_data(self.data, self.labels, self.image_size, names, **more)

    def make_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.make(self.schedule, self.timesteps, self.beta_start, self.beta_end)

    def of_network(self) -> dict[str, object]:
        """Those of OF_NETWORKS that are asked for, as `network_for` takes them."""
        own = given({name: getattr(self, name) for name in OF_NETWORKS})
        return own | {name: tuple(map(int, own[name].split(","))) for name in ("multipliers",) if name in own}

    def make_network(self, dataset: Dataset) -> nn.Module:
        """A freshly initialised network for the data; the same seed gives the same weights. Or that of the run `init`.

        Raises BadInput, also if that run's does not fit these data and options.
        """
        shape, classes = tuple(dataset.values.shape[1:]), 0 if dataset.labels is None else dataset.labels.shape[1]
        if self.init is not None:
            return self._initial(shape, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                return network_for(self.network, shape, classes, self.n_feat, **self.of_network())
            except ValueError as error:
                name, _, what = str(error).partition(":")
                option = ASKED.get(name)
                raise BadInput(f"--{option.replace('_', '-')}:{what}" if option else str(error)) from error
            except (RuntimeError, MemoryError) as error:
                raise BadInput(
                    f"--n-feat: got {self.n_feat}, needs a network that can be made ({first_line(error)})"
                ) from error

    def _initial(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        for name, value in given({name: getattr(self, name) for name in OF_NETWORKS}).items():
            raise BadInput(f"--{name.replace('_', '-')}: got {value}, but --init takes over a network, needs none")
        run = load_run(self.init)
        name = name_of(run.model)
        must_match = {
            "network": (name, self.network or name),
            "n_feat": (run.config["model"].get("n_feat", self.n_feat), self.n_feat),
            "prediction": (run.config["prediction"], self.prediction),
            "samples of shape": (list(sample_shape(run.model)), list(shape)),
            "number of classes": (math.prod(condition_shape(run.model) or (0,)), classes),
        }
        for what, (theirs, own) in must_match.items():
            if theirs != own:
                raise BadInput(f"--init: {self.init} has {what} {theirs}, this run {own}, needs the same")
        return run.model
