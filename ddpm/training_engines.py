"""Engines of training: ways to execute the steps of `Trainer`. They draw the same numbers and differ by rounding.

eager    `Trainer` itself: the data set on the host, module by module. The reference, and the default everywhere.
compile  the data set on the device, from where one operator gathers, normalises, mirrors and diffuses a batch; channels
         last; forward, loss and backward through torch.compile; fused Adam. One graph serves the whole run, because
         batches run across the ends of epochs and all that changes is in tensors.
graph    CUDA only: the whole step of `compile`, with clipping, Adam and moving average, as one CUDA graph.

Measured on two cores of a Xeon with AVX-512 (n_feat 64, 3x16x16, batch 100, fp32, torch 2.13, medians of 7 interleaved
forward and backward passes): 146 images/s eager, 174 channels_last, 169 compiled, 170 both. So on the CPU `compile`
gains by its layout what it would also gain without compiling; neither helps emulated bf16 (55 to 57 images/s).
"""

import logging
import time
import types
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from ddpm import engines
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.errors import BadInput
from ddpm.networks import network_times, without_condition
from ddpm.networks.protocol import in_type
from ddpm.schedule import NoiseSchedule
from ddpm.training import Trainer, TrainOptions, per_sample_loss, target_of
from kernels import backend, noise_mse, philox
from kernels.q_sample import pixels_to_unit
from kernels.q_sample_rows import q_sample_rows

logger = logging.getLogger("ddpm")

WARM_UP = 3  # steps before a capture, as PyTorch's documentation asks for: they allocate, compile and tune


class Objective(nn.Module):
    """The training loss of rows of a data set that is on the device.

    Args: the network; alpha_bars float32 [T+1]; weights float32 [T+1] or None (min-SNR); the run's options.
    """

    def __init__(self, network: nn.Module, alpha_bars: Tensor, weights: Tensor | None, options: TrainOptions) -> None:
        super().__init__()
        self.network, self.options = network, options
        self.alpha_bars, self.weights = alpha_bars, weights
        self.seed = torch.tensor(options.seed, device=alpha_bars.device)
        # The kernel draws the target again, which is faster than storing it; the reference on the CPU is not (batch 100
        # of 3x16x16: 6 ms for forward and backward).
        is_noise_mse = options.prediction == "eps" and options.loss == "mse"
        self.regenerates = is_noise_mse and backend.runs_triton(alpha_bars)

    def diffused(self, values: Tensor, rows: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x_t [n, ...], t int64 [n], noise like x_t or None where the loss draws it again)."""
        keep_noise = not self.regenerates
        flip = self.options.flip
        return q_sample_rows(values, rows, self.alpha_bars, self.seed, samples, flip=flip, keep_noise=keep_noise)

    def clean(self, values: Tensor, rows: Tensor, samples: Tensor) -> Tensor:
        """x0 float32 [n, ...], mirrored as `diffused` does."""
        x0 = values[rows]
        if self.options.flip:
            mirrored = philox.flipped(self.seed, samples).reshape(-1, *(1,) * (x0.ndim - 1))
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return pixels_to_unit(x0)

    def context(self, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor | None:
        """Labels [n, ...] of the rows, "no condition" where they are dropped."""
        if labels is None:
            return None
        dropped = philox.condition_dropped(self.seed, samples, self.options.context_dropout)
        return without_condition(self.network, labels[rows], dropped)

    def forward(self, values: Tensor, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor:
        """values [N, ...], labels [N, K] or None; of them rows int64 [n] as samples int64 [n] -> the loss, a scalar."""
        x_t, t, noise = self.diffused(values, rows, samples)
        context = self.context(labels, rows, samples)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            output = self.network(x_t, in_type(network_times(self.network, t, self.alpha_bars.shape[0] - 1)), context)
        output = output.float()
        weight = None if self.weights is None else self.weights[t]
        if self.regenerates:
            return noise_mse(output, self.seed, samples, weight)
        alpha_bar = self.alpha_bars[t].reshape(-1, *(1,) * (x_t.ndim - 1))
        # For eps the compiler drops x0, which nothing reads.
        target = target_of(self.options.prediction, self.clean(values, rows, samples), noise, alpha_bar)
        per_sample = per_sample_loss(self.options.loss, output, target)
        return per_sample.mean() if weight is None else (per_sample * weight).mean()


def _call(objective: Objective, values: Tensor, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor:
    return Objective.forward(objective, values, labels, rows, samples)


def compiled(objective: Objective, compiler: str) -> Objective:
    """The objective with its forward pass through torch.compile, by this compiler ("inductor").

    torch.compile keeps what it made per code object and refuses after eight, so every objective gets its own.
    """
    own = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    objective.forward = torch.compile(types.MethodType(own, objective), fullgraph=True, dynamic=False, backend=compiler)
    return objective


def _dense(values: Tensor) -> Tensor:
    """Images channels_last, points contiguous: x_t has the layout of its data."""
    return values.contiguous(memory_format=torch.channels_last if values.ndim == 4 else torch.contiguous_format)


def has_room(size: int, device: torch.device) -> bool:
    """Whether a data set of so many bytes may live on the device: at most half of what is free on CUDA."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


class CompileTrainer(Trainer):
    """Arguments as `Trainer`. The first step compiles (about half a minute on a CPU) and logs how long that took.

    A data set that does not fit on the device stays on the host, said aloud, and each step's rows are copied.
    """

    engine = "compile"
    compiler = "inductor"

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        schedule: NoiseSchedule,
        options: TrainOptions,
        device: torch.device,
        world: World,
    ) -> None:
        super().__init__(network, dataset, schedule, options, device, world)
        self.warm = False
        self.data = (dataset.values, dataset.labels)
        size = sum(tensor.nbytes for tensor in self.data if tensor is not None)
        self.resident = has_room(size, device)
        if self.resident:
            values = _dense(dataset.values.to(device))
            self.data = (values, None if dataset.labels is None else dataset.labels.to(device))
        elif world.is_main:
            logger.info(
                "engine %s: the data (%.1f GB) stay on the host, too many for %s", self.engine, size / 1e9, device
            )

        self._order_there = lru_cache(maxsize=2)(lambda epoch: self._order(epoch).to(self.data[0].device))

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=torch.channels_last)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=self.options.lr, fused=True)

    def _wrapped(self) -> nn.Module:
        own = Objective(self.network, self.alpha_bars, self.weights, self.options)
        return self.world.wrap(compiled(own, self.compiler), self.device)

    def rows(self, index: int) -> Tensor:
        """This rank's rows of the data set in a step, int64 [n], on the device of `data`."""
        first, end = self.span(index)
        count, pieces = len(self.dataset), []
        while first < end:
            epoch, position = divmod(first, count)
            pieces.append(self._order_there(epoch)[position : position + end - first])
            first += len(pieces[-1])
        return torch.cat(pieces)

    def inputs(self, index: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the objective takes in a step: (values, labels, rows, samples), on the device."""
        samples, rows = torch.arange(*self.span(index), device=self.device), self.rows(index)
        if self.resident:
            return *self.data, rows, samples
        values, labels = (None if tensor is None else tensor[rows].to(self.device) for tensor in self.data)
        return _dense(values), labels, torch.arange(len(rows), device=self.device), samples

    def objective(self, index: int) -> Tensor:
        """As in `Trainer`."""
        return self.parallel(*self.inputs(index))

    def step(self) -> None:
        """As in `Trainer`."""
        if self.warm:
            self._step()
            return
        if self.world.is_main:
            logger.info("engine %s: compiling in the first step", self.engine)
        began = time.perf_counter()
        self._step()
        self.warm = True
        if self.world.is_main:
            logger.info("engine %s: ready after %.1f s", self.engine, time.perf_counter() - began)

    def _step(self) -> None:
        super().step()


class GraphTrainer(CompileTrainer):
    """CUDA only, one process. Arguments as `Trainer`.

    Rows, sample indices, learning rate and step number live in buffers that the graph reads, so that a step costs the
    host a few small launches and one replay. Losses go to their place in `losses` by the graph itself. Not yet run on a
    GPU.
    """

    engine = "graph"

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        schedule: NoiseSchedule,
        options: TrainOptions,
        device: torch.device,
        world: World,
    ) -> None:
        super().__init__(network, dataset, schedule, options, device, world)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.k = torch.zeros(1, dtype=torch.int64, device=device)

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
        self.buffers = tuple(
            tensor if tensor is None or any(tensor is held for held in self.data) else tensor.clone()
            for tensor in self.inputs(self.index)
        )
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.k.fill_(self.index)
                self._body()
        torch.cuda.current_stream(self.device).wait_stream(side)
        with torch.no_grad():
            for name, tensor in self.state().items():
                # Adam's moments did not exist before a run's first step: they begin at zero.
                tensor.copy_(before[name]) if name in before else tensor.zero_()
        self.k.fill_(self.index)
        # The graph's own memory must hold the gradients: none of an earlier step may be added to.
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._body()

    def _step(self) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        rate.fill_(self.learning_rate(self.index))
        if self.graph is None:
            self._capture()
        for own, given in zip(self.buffers, self.inputs(self.index), strict=True):
            if own is not given:
                own.copy_(given)
        self.graph.replay()
        self.index += 1

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        super()._load_state(state)
        # Adam's moments are new tensors now, the graph updates the old ones.
        self.graph, self.warm = None, False


TRAINERS: dict[str, type[Trainer]] = {"eager": Trainer, "compile": CompileTrainer, "graph": GraphTrainer}


def make_trainer(
    network: nn.Module,
    dataset: Dataset,
    schedule: NoiseSchedule,
    options: TrainOptions,
    device: torch.device,
    world: World,
) -> Trainer:
    """The trainer of `options.engine`: its `step()` is one training step.

    Raises BadInput for an engine that this machine or this number of ranks cannot run.
    """
    lack = engines.missing(options.engine, device)
    if lack is None and options.engine == "graph" and world.size > 1:
        lack = f"a single process, there are {world.size} ranks: take compile or eager"
    if lack is not None:
        raise BadInput(f"--engine: {options.engine!r} needs {lack}")
    if options.precision == "bf16" and world.is_main:
        engines.say_if_emulated(device)
    return TRAINERS[options.engine](network, dataset, schedule, options, device, world)
