"""Engines of training: ways to execute steps on the one objective. They draw the same numbers and differ by rounding.

eager    `Trainer`: the data set on the host, module by module. The reference, and the default everywhere.
compile  the data set on the device, from where one operator gathers, normalises, mirrors and diffuses a batch; channels
         last; the objective and its backward through torch.compile; fused Adam. One graph serves the whole run, because
         batches run across the ends of epochs and all that changes is in tensors.
graph    CUDA only: the whole step of `compile`, with clipping, Adam and moving average, as one CUDA graph.

Measured on two cores of a Xeon with AVX-512 (n_feat 64, 3x16x16, batch 100, fp32, torch 2.13, medians of 7 interleaved
forward and backward passes): 146 images/s eager, 174 channels_last, 169 compiled, 170 both. So on the CPU `compile`
gains by its layout what it would also gain without compiling; neither helps emulated bf16 (55 to 57 images/s).

Training sample g = step * batch + position is item j of epoch k with g = k N + j, so batches run across the ends of
epochs and every random number is a function of (seed, g) alone: a run has no other state than its tensors.
"""

import logging
import math
import time
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpm import engines
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.engines.graph import warm_up
from ddpm.errors import BadInput
from ddpm.precision import reproducible_convolutions
from ddpm.schedule import NoiseSchedule
from ddpm.training.objective import Objective
from ddpm.training.options import TrainOptions
from kernels import philox

logger = logging.getLogger("ddpm")

STEPS_MAX = 100_000_000  # untuned: the losses of so many take 400 MB
ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")


def has_room(size: int, device: torch.device) -> bool:
    """Whether a data set of so many bytes may live on the device: at most half of what is free on CUDA."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


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
    """A network in training: `step()` until `done`. This is the eager engine; `make_trainer` makes any of them."""

    engine: ClassVar[str] = "eager"
    moves_data: ClassVar[bool] = False  # to the device, for the whole run, where there is room
    layout: ClassVar[torch.memory_format | None] = None  # of images and weights; None: their own
    warm = True  # nothing is compiled in the first step
    run_id: str | None = None  # of the folder that keeps the run
    more: Mapping[str, Any] = types.MappingProxyType({})  # what else its config.json says

    def __init__(
        self, network: nn.Module, dataset: Dataset, options: TrainOptions, device: torch.device, world: World
    ) -> None:
        if options.engine != self.engine:
            raise ValueError(f"engine: got {options.engine!r}, {type(self).__name__} needs {self.engine!r}")
        if options.batch_size % world.size:
            raise BadInput(f"--batch-size: got {options.batch_size}, needs a multiple of the {world.size} ranks")
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        if options.batch_size // world.size == 1 and normalised:
            needs = "at least 2 images per rank (BatchNorm)"
            raise BadInput(f"--batch-size: got {options.batch_size} on {world.size} ranks, needs {needs}")
        if options.flip and not dataset.is_images:
            raise BadInput(f"--flip: mirrors images, {dataset.name} has points, needs none")
        self.options, self.dataset, self.device, self.world, self.index = options, dataset, device, world, 0
        self.schedule = self._schedule()
        self.network = network.to(device, memory_format=self.layout).train()
        self.optimizer = self._adam()
        self.ema = Ema(self.network, options.ema_decay)
        self.total = self._total()
        if self.total > STEPS_MAX:
            raise BadInput(f"--epochs: got {options.epochs}, which are {self.total} steps, needs at most {STEPS_MAX}")
        self.losses = torch.full((self.total,), math.nan, device=device)
        self.data, self.resident = self._placed_data()
        count, where = len(dataset), self.data[0].device
        self.order = lru_cache(maxsize=2)(lambda epoch: philox.epoch_order(options.seed, epoch, count).to(where))
        self.objective = self._objective()
        self.parallel = world.wrap(self.objective, device)

    def _schedule(self) -> NoiseSchedule:
        return self.options.make_schedule()

    def _total(self) -> int:
        """How many steps there are."""
        return math.ceil(self.options.epochs * len(self.dataset) / self.options.batch_size)

    def _objective(self) -> nn.Module:
        return Objective(self.network, self.schedule, self.options, self.device, plain=not self.moves_data)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=self.options.lr, fused=self.moves_data or None)

    def _placed_data(self) -> tuple[tuple[Tensor, Tensor | None], bool]:
        """((values, labels) of the data set, whether they are on the device); what does not fit stays on the host."""
        data = self.dataset.values, self.dataset.labels
        size = sum(tensor.nbytes for tensor in data if tensor is not None)
        if has_room(size, self.device) if self.moves_data else self.device.type == "cpu":
            return self._moved(*data), True
        if self.moves_data and self.world.is_main:
            left = f"the data ({size / 1e9:.1f} GB) stay on the host, too many for {self.device}"
            logger.info("engine %s: %s", self.engine, left)
        return data, False

    def _moved(self, values: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """On the device, images in the engine's layout, points contiguous: x_t has the layout of its data."""
        values, labels = values.to(self.device), None if labels is None else labels.to(self.device)
        layouts = (self.layout,) if self.layout else (torch.contiguous_format, torch.channels_last)
        layouts = layouts if values.ndim == 4 else (torch.contiguous_format,)
        if not any(values.is_contiguous(memory_format=layout) for layout in layouts):
            values = values.contiguous(memory_format=layouts[0])
        return values, labels

    @property
    def done(self) -> bool:
        return self.index >= self.total

    def epoch_of(self, index: int) -> int:
        """The epoch of the first sample of a step."""
        return index * self.options.batch_size // len(self.dataset)

    def learning_rate(self, index: int) -> float:
        """lr * (1 - epoch / epochs), the original's rule."""
        return self.options.lr * (1 - self.epoch_of(index) / self.options.epochs)

    def span(self, index: int) -> tuple[int, int]:
        """This rank's global training samples of a step: first, last + 1."""
        size = self.options.batch_size // self.world.size
        first = index * self.options.batch_size + self.world.rank * size
        return first, first + size

    def rows(self, index: int) -> Tensor:
        """This rank's rows of the data set in a step, int64 [n], on the device of `data`."""
        first, end = self.span(index)
        count, pieces = len(self.dataset), []
        while first < end:
            epoch, position = divmod(first, count)
            pieces.append(self.order(epoch)[position : position + end - first])
            first += len(pieces[-1])
        return torch.cat(pieces)

    def inputs(self, index: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the objective takes in a step: (values, labels, rows, samples), on the device."""
        samples, rows = torch.arange(*self.span(index), device=self.device), self.rows(index)
        if self.resident:
            return *self.data, rows, samples
        here = self._moved(*(None if tensor is None else tensor[rows] for tensor in self.data))
        return *here, torch.arange(len(rows), device=self.device), samples

    def optimise(self, loss: Tensor, k: int | Tensor) -> None:
        """Backward, clipping, Adam and the moving average of step k."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.update(k)

    def update(self, k: int | Tensor) -> None:
        """Clipping, Adam and the moving average of step k."""
        if self.options.clip_grad:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_grad)
        self.optimizer.step()
        self.ema.update(self.network, k)

    def step(self) -> None:
        """One optimiser step on the next batch."""
        began, logs = time.perf_counter(), self.world.is_main and not self.warm
        if logs:
            logger.info("engine %s: compiling in the first step", self.engine)
        with reproducible_convolutions():
            self._step()
        self.warm = True
        if logs:
            logger.info("engine %s: ready after %.1f s", self.engine, time.perf_counter() - began)

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.index)
        loss = self.parallel(*self.inputs(self.index))
        self.optimise(loss, self.index)
        self.losses[self.index] = self.world.mean(loss.detach())
        self.index += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on: `network.*`, `ema.*`, `adam.*`, losses, step (steps done)."""
        state = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        for name, parameter in self.network.named_parameters():
            held = self.optimizer.state.get(parameter) or {"step": torch.tensor(0.0)}  # it never had a gradient
            state |= {f"adam.{name}.{key}": tensor for key, tensor in held.items()}
        return state | {"losses": self.losses, "step": torch.tensor(self.index)}

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError naming the first entry that `state()` of this run could not have."""
        needed = {name: tensor for name, tensor in self.state().items() if not name.startswith("adam.")}
        steps = [f"adam.{name}.step" for name, _ in self.network.named_parameters()]
        for step, (name, parameter) in zip(steps, self.network.named_parameters(), strict=True):
            needed[step] = torch.tensor(0.0)
            if step not in state or state[step].any():
                needed |= {f"adam.{name}.{key}": parameter for key in ADAM_KEYS[1:]}
        for name in sorted(needed.keys() ^ state.keys()):
            raise ValueError(f"{'has' if name in state else 'lacks'} {name!r}")
        for name, tensor in needed.items():
            found, own = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (state[name], tensor))
            if found != own:
                raise ValueError(f"{name!r} is {found}, needs {own}")
        done = int(state["step"])
        for name, most in {"step": self.total, **dict.fromkeys(steps, done)}.items():
            if not 0 <= state[name] <= most:
                raise ValueError(f"{name!r} is {float(state[name]):g}, needs 0..{most}")
        for name, tensor in state.items():
            if not (tensor[:done] if name == "losses" else tensor).isfinite().all():
                raise ValueError(f"{name!r} has NaN or infinite values, needs finite ones")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`. Raises BadInput, before anything is changed, if it is of another run."""
        try:
            self._check_state(state)
        except ValueError as error:
            raise BadInput(f"training state does not fit this network or data: {error}") from error
        self.network.load_state_dict({name: state[f"network.{name}"] for name in self.network.state_dict()})
        for name, tensor in self.ema.tensors.items():
            tensor.copy_(state[f"ema.{name}"])
        for name, parameter in self.network.named_parameters():
            moments = {key: state[f"adam.{name}.{key}"] for key in ADAM_KEYS if f"adam.{name}.{key}" in state}
            step = moments.pop("step")
            if moments:
                step = step.to(parameter.device if self.optimizer.defaults["fused"] else "cpu")
                # In the parameters' memory layout, which files do not keep and fused Adam takes for granted.
                moved = {key: torch.empty_like(parameter).copy_(tensor) for key, tensor in moments.items()}
                self.optimizer.state[parameter] = {"step": step, **moved}
        self.losses.copy_(state["losses"])
        self.index = int(state["step"])


def _call(objective: Objective, values: Tensor, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor:
    return Objective.forward(objective, values, labels, rows, samples)


class CompileTrainer(Trainer):
    """Arguments as `Trainer`. The first step compiles (about half a minute on a CPU) and logs how long that took."""

    engine = "compile"
    moves_data = True
    layout = torch.channels_last
    compiler = "inductor"
    warm = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # torch.compile keeps what it made per code object and refuses after eight, so every objective gets its own.
        own = types.MethodType(types.FunctionType(_call.__code__.replace(), _call.__globals__), self.objective)
        self.objective.forward = torch.compile(own, fullgraph=True, dynamic=False, backend=self.compiler)


class GraphTrainer(CompileTrainer):
    """CUDA only, one process. Arguments as `Trainer`. Not yet run on a GPU.

    All that changes lives in buffers that the graph reads, so a step costs the host small launches and one replay.
    """

    engine = "graph"
    graph: torch.cuda.CUDAGraph | None = None

    def _adam(self) -> torch.optim.Adam:
        rate = torch.tensor(self.options.lr, device=self.device)
        return torch.optim.Adam(self.network.parameters(), lr=rate, fused=True, capturable=True)

    def _body(self) -> None:
        """What is captured: one step on `buffers`, as step `k`."""
        loss = self.parallel(*self.buffers)
        self.optimise(loss, self.k[0])
        self.losses.index_copy_(0, self.k, loss.detach()[None])
        self.k.add_(1)

    def _capture(self) -> None:
        """Warm up, put everything back as it was, capture."""
        self.k = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.buffers = tuple(
            tensor if tensor is None or any(tensor is held for held in self.data) else tensor.clone()
            for tensor in self.inputs(self.index)
        )
        before = {name: tensor.clone() for name, tensor in self.state().items()}

        def again() -> None:
            self.k.fill_(self.index)
            self._body()

        side = warm_up(self.device, again)
        with torch.no_grad():
            for name, tensor in self.state().items():
                # Adam's moments did not exist before a run's first step: they begin at zero.
                tensor.copy_(before[name]) if name in before else tensor.zero_()
        self.k.fill_(self.index)
        # The graph's own memory must hold the gradients: none of an earlier step may be added to.
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        # On the stream of the warm-up: gradients are accumulated on the one that their graph was made on.
        with torch.cuda.graph(self.graph, stream=side):
            self._body()

    def _step(self) -> None:
        self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate(self.index))
        if self.graph is None:
            self._capture()
        for own, given in zip(self.buffers, self.inputs(self.index), strict=True):
            if own is not given:
                own.copy_(given)
        self.graph.replay()
        self.index += 1

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        # Adam's moments are new tensors now, the graph updates the old ones.
        self.graph, self.warm = None, False


TRAINERS: dict[str, type[Trainer]] = {kind.engine: kind for kind in (Trainer, CompileTrainer, GraphTrainer)}


def make_trainer(
    network: nn.Module, dataset: Dataset, options: TrainOptions, device: torch.device, world: World
) -> Trainer:
    """The trainer of `options.engine`. Raises BadInput for one that this machine or number of ranks cannot run."""
    lack = engines.unavailable_reason(options.engine, device)
    if lack is None and options.engine == "graph" and world.size > 1:
        lack = f"a single process, there are {world.size} ranks: take compile or eager"
    if lack is not None:
        raise BadInput(f"--engine: {options.engine!r} needs {lack}")
    if options.precision == "bf16" and world.is_main:
        engines.log_if_emulated(device)
    return TRAINERS[options.engine](network, dataset, options, device, world)
