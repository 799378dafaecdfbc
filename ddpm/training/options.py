"""What a training run may be asked for."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ddpm.data import Dataset, load_data
from ddpm.errors import BadInput
from ddpm.networks import network_for
from ddpm.schedule import NoiseSchedule
from ddpm.table import PREDICTIONS
from kernels import philox

LOSSES = ("mse", "l1", "huber")
PRECISIONS = ("fp32", "bf16")
ENGINES = ("eager", "compile", "graph")
CHOICES = {"loss": LOSSES, "precision": PRECISIONS, "prediction": PREDICTIONS, "engine": ENGINES}
RANGES = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "min_snr": (0, math.inf),
    "ema_decay": (0, 1),
    "context_dropout": (0, 1),
    "clip_grad": (0, math.inf),
    "seed": (0, philox.SEED_LIMIT - 1),
}


@dataclass(frozen=True)
class TrainOptions:
    """All that a training run was asked for; stored in config.json and compared by --resume.

    data, labels, image_size, classes: see `load_data`. network: by its name, None = the usual one for such data.
    schedule, timesteps, beta_start, beta_end: see `NoiseSchedule`.
    n_feat: width of the network. prediction: eps, v or x0. loss: mse, l1 or huber. min_snr: gamma, 0 = off.
    epochs; batch_size over all ranks; lr of Adam, falling linearly per epoch; ema_decay; context_dropout: probability
    of losing the condition; clip_grad: norm, 0 = off; precision: fp32 or bf16 (autocast); flip: mirror half of the
    images; seed; engine: how steps are executed, see `ddpm.training.engines`, which changes results by rounding only.
    Raises BadInput for values out of range.
    """

    data: str = "digits"
    labels: str | None = None
    image_size: int | None = None
    classes: str | None = None
    network: str | None = None
    n_feat: int = 64
    schedule: str = "linear"
    timesteps: int = 500
    beta_start: float | None = None
    beta_end: float | None = None
    prediction: str = "eps"
    loss: str = "mse"
    min_snr: float = 0.0
    epochs: int = 30
    batch_size: int = 100
    lr: float = 1e-3
    ema_decay: float = 0.999
    context_dropout: float = 0.1
    clip_grad: float = 1.0
    precision: str = "fp32"
    flip: bool = False
    seed: int = 0
    engine: str = "eager"

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                bounds = f">= {low}" if high == math.inf else f"{low}..{high}"
                raise BadInput(f"--{name.replace('_', '-')}: got {value}, needs {bounds}")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--lr: got {self.lr}, needs a finite rate > 0")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(f"--{name}: got {getattr(self, name)!r}, needs one of {', '.join(known)}")
        if not self.data:
            raise BadInput("--data: got an empty text, needs digits, swiss-roll, a file or a folder")

    def load_data(self) -> Dataset:
        names = None if self.classes is None else self.classes.split(",")
        return load_data(self.data, self.labels, self.image_size, names)

    def make_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.make(self.schedule, self.timesteps, self.beta_start, self.beta_end)

    def make_network(self, dataset: Dataset) -> nn.Module:
        """A freshly initialised network for the data; the same seed gives the same weights. Raises BadInput."""
        shape, classes = tuple(dataset.values.shape[1:]), len(dataset.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                return network_for(self.network, shape, classes, self.n_feat)
            except ValueError as error:
                raise BadInput(f"--{error}" if str(error).startswith("network") else str(error)) from error
