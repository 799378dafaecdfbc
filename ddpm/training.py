"""Training: noise prediction (or v, or x0) with an exponential moving average, reproducible bit for bit.

Training sample g = step * batch + position is item j of epoch k with g = k N + j, so batches run across the ends of
epochs and every random number is a function of (seed, g) alone: a run has no other state than its tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.data import Dataset, load_data
from ddpm.distributed import World
from ddpm.errors import BadInput
from ddpm.networks import network_for, network_times, without_condition
from ddpm.networks.protocol import in_type
from ddpm.schedule import NoiseSchedule
from ddpm.table import PREDICTIONS
from kernels import philox, q_sample
from kernels.q_sample import pixels_to_unit

LOSSES = ("mse", "l1", "huber")
PRECISIONS = ("fp32", "bf16")
ENGINES = ("eager", "compile", "graph")


@dataclass(frozen=True)
class TrainOptions:
    """All that a training run was asked for; stored in config.json and compared by --resume.

    data, labels, image_size, classes: see `load_data`. network: by its name, None = the usual one for such data.
    schedule, timesteps, beta_start, beta_end: see `NoiseSchedule`.
    n_feat: width of the network. prediction: eps, v or x0. loss: mse, l1 or huber. min_snr: gamma, 0 = off.
    epochs; batch_size over all ranks; lr of Adam, falling linearly per epoch; ema_decay; context_dropout: probability
    of losing the condition; clip_grad: norm, 0 = off; precision: fp32 or bf16 (autocast); flip: mirror half of the
    images; seed; engine: how steps are executed, see `ddpm.training_engines`, which changes results by rounding only.
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
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("min_snr", 0, math.inf),
            ("ema_decay", 0, 1),
            ("context_dropout", 0, 1),
            ("clip_grad", 0, math.inf),
            ("seed", 0, philox.SEED_LIMIT - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                bounds = f">= {low}" if high == math.inf else f"{low}..{high}"
                raise BadInput(f"--{name.replace('_', '-')}: got {value}, needs {bounds}")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--lr: got {self.lr}, needs a finite rate > 0")
        choices = {"loss": LOSSES, "precision": PRECISIONS, "prediction": PREDICTIONS, "engine": ENGINES}
        for name, known in choices.items():
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


def target_of(prediction: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network shall output; alpha_bar broadcasts against x0. v is Salimans & Ho 2022, section 4."""
    if prediction == "eps":
        return noise
    return x0 if prediction == "x0" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def min_snr_weights(alpha_bars: Tensor, prediction: str, gamma: float) -> Tensor:
    """Loss weight of every t, float64 [T+1] (Hang et al. 2023, section 3.4): min(SNR, gamma) over 1, SNR or SNR + 1."""
    snr = alpha_bars / (1 - alpha_bars).clamp(min=torch.finfo(torch.float64).tiny)
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / divisor


def per_sample_loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """mse, l1 or huber (delta 1), averaged over each sample: [n]."""
    function = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[kind]
    return function(output, target, reduction="none").flatten(1).mean(dim=1)


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


class Trainer:
    """A network in training: `step()` until `done`. Its whole state is `state()`.

    This is the eager engine, the reference for the others; `ddpm.training_engines.make_trainer` makes any of them.
    """

    engine = "eager"

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        schedule: NoiseSchedule,
        options: TrainOptions,
        device: torch.device,
        world: World,
    ) -> None:
        if options.engine != self.engine:
            raise ValueError(f"engine: got {options.engine!r}, {type(self).__name__} needs {self.engine!r}")
        if options.batch_size % world.size:
            raise BadInput(f"--batch-size: got {options.batch_size}, needs a multiple of the {world.size} ranks")
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        if options.batch_size // world.size == 1 and normalised:
            raise BadInput(
                f"--batch-size: got {options.batch_size} on {world.size} ranks, needs at least 2 images per rank "
                "(BatchNorm)"
            )
        self.options, self.dataset, self.world = options, dataset, world
        self.device, self.schedule = device, schedule
        self.network = self._placed(network).train()
        self.optimizer = self._adam()
        self.ema = Ema(self.network, options.ema_decay)
        self.alpha_bars = schedule.alpha_bars.to(device, torch.float32)
        self.weights = None
        if options.min_snr:
            weights = min_snr_weights(schedule.alpha_bars, options.prediction, options.min_snr)
            self.weights = weights.to(device, torch.float32)
        self.index = 0
        self.total = math.ceil(options.epochs * len(dataset) / options.batch_size)
        self.losses = torch.full((self.total,), math.nan, device=device)
        self._order = lru_cache(maxsize=2)(lambda epoch: philox.epoch_order(options.seed, epoch, len(dataset)))
        self.parallel = self._wrapped()

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=self.options.lr)

    def _wrapped(self) -> nn.Module:
        """What a step calls for its forward pass, over all ranks."""
        return self.world.wrap(self.network, self.device)

    @property
    def done(self) -> bool:
        return self.index >= self.total

    def epoch_of(self, index: int) -> int:
        """The epoch of the first sample of a step."""
        return index * self.options.batch_size // len(self.dataset)

    def learning_rate(self, index: int) -> float:
        """lr * (1 - epoch / epochs), the original's rule."""
        return self.options.lr * (1 - self.epoch_of(index) / self.options.epochs)

    def items(self, samples: Tensor) -> Tensor:
        """Rows of the data set for global training samples, int64 [n]."""
        n = len(self.dataset)
        epochs, positions = samples // n, samples % n
        rows = torch.empty_like(samples)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch)[positions[here]]
        return rows

    def span(self, index: int) -> tuple[int, int]:
        """This rank's global training samples of a step: first, last + 1."""
        size = self.options.batch_size // self.world.size
        first = index * self.options.batch_size + self.world.rank * size
        return first, first + size

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's (samples int64 [n], x0 [n, ...], context [n, ...] or None) of a step, on the device."""
        samples = torch.arange(*self.span(index))
        rows = self.items(samples)
        x0 = self.dataset.values[rows]
        if self.options.flip:
            mirrored = philox.flipped(self.options.seed, samples)
            x0[mirrored] = x0[mirrored].flip(-1)
        context = None
        if self.dataset.labels is not None:
            dropped = philox.condition_dropped(self.options.seed, samples, self.options.context_dropout)
            context = without_condition(self.network, self.dataset.labels[rows], dropped).to(self.device)
        return samples.to(self.device), x0.to(self.device), context

    def loss(self, samples: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        """The training loss of a batch, a scalar with gradient."""
        t = philox.training_timesteps(self.options.seed, samples, self.schedule.timesteps)
        x_t, noise = q_sample(x0, t, self.alpha_bars, self.options.seed, samples)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            output = self.parallel(x_t, in_type(network_times(self.network, t, self.schedule.timesteps)), context)
        alpha_bar = self.alpha_bars[t].reshape(-1, *(1,) * (x_t.ndim - 1))
        target = target_of(self.options.prediction, pixels_to_unit(x0), noise, alpha_bar)
        per_sample = per_sample_loss(self.options.loss, output.float(), target)
        return per_sample.mean() if self.weights is None else (per_sample * self.weights[t]).mean()

    def objective(self, index: int) -> Tensor:
        """The loss of a step's batch, a scalar with gradient."""
        return self.loss(*self.batch(index))

    def optimise(self, loss: Tensor, k: int | Tensor) -> None:
        """Backward, clipping, Adam and the moving average of step k."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.options.clip_grad:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_grad)
        self.optimizer.step()
        self.ema.update(self.network, k)

    def step(self) -> None:
        """One optimiser step on the next batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.index)
        loss = self.objective(self.index)
        self.optimise(loss, self.index)
        self.losses[self.index] = self.world.mean(loss.detach())
        self.index += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, by name: `network.*`, `ema.*`, `adam.*`, losses, step."""
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
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments = {key: state[f"adam.{name}.{key}"] for key in keys if f"adam.{name}.{key}" in state}
            if moments:
                step = moments.pop("step").to(parameter.device if self.optimizer.defaults["fused"] else "cpu")
                # In the parameters' memory layout, which files do not keep and fused Adam takes for granted.
                moved = {key: torch.empty_like(parameter).copy_(tensor) for key, tensor in moments.items()}
                self.optimizer.state[parameter] = {"step": step, **moved}
        self.losses.copy_(state["losses"])
        self.index = int(state["step"])
