"""The rungs: eager -> folded -> tables -> shared -> channels_last -> winograd -> compile -> bf16 (-> graph, on CUDA).

Each is an engine that has everything of the rung above and one thing more, so the difference of two rungs is what that
one thing brings. What is timed are the first TIMED_STEPS rows of the very trajectory whose quality is judged.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import PARITY, engine_error
from bench.timing import Call
from ddpm.engines import Engine, choose, missing
from ddpm.engines.compile import CompileEngine
from ddpm.engines.eager import EagerEngine
from ddpm.engines.fused import FusedEngine
from ddpm.inference import InferenceUnet, computed_in, fold_batch_norm
from ddpm.noise import PhiloxNoise
from ddpm.runs import Run
from ddpm.solvers import StepTable
from kernels.backend import Cost
from kernels.philox import Stream
from kernels.winograd import missing as kernel_missing

EAGER = "eager"
# Five steps' noise of 32 samples is one draw of the fused engine, see `ddpm.engines.fused.AHEAD`.
TIMED_STEPS = 5

Callback = Callable[[int, Tensor], None]
# build(network, T, table, dtype) -> engine
Build = Callable[..., Engine]


@dataclass(frozen=True)
class Rung:
    """adds: what it has beyond the rung above. engine: the name in `ddpm.engines` that the machine must be able to run.

    build: makes it; None takes the engine of that name as it is. native: whether it is the operator `winograd`.
    """

    adds: str
    engine: str
    dtype: torch.dtype = torch.float32
    build: Build | None = None
    native: bool = False

    def missing(self, device: torch.device) -> str | None:
        """What this machine lacks to run it, or None."""
        if self.native and device.type != "cpu":
            return f"a CPU, the model is on {device}"
        return missing(self.engine, device, self.dtype) or (kernel_missing() if self.native else None)


def _folded(model: torch.nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype) -> Engine:
    return EagerEngine(fold_batch_norm(model), timesteps, table, dtype)


def _form(
    options: dict[str, bool], model: torch.nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype
) -> Engine:
    """Engine `fused` on an inference form with these options."""
    return FusedEngine(model, timesteps, table, dtype, InferenceUnet(model, dtype, **options))


def _bfloat16(model: torch.nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype) -> Engine:
    """In that type even where the engines take float32 instead, because it is emulated."""
    if computed_in(dtype, next(model.parameters()).device) == dtype:
        return CompileEngine(model, timesteps, table, dtype)
    return _form({}, model, timesteps, table, dtype)


RUNGS = {
    EAGER: Rung("module, table, plain torch operators", "eager"),
    "folded": Rung("BatchNorm folded into its convolution", "eager", build=_folded),
    "tables": Rung(
        "embeddings of time and context computed once a run; no concatenation before ConvTranspose; noise drawn ahead",
        "fused",
        build=partial(_form, {"channels_last": False, "shared": False}),
    ),
    "shared": Rung(
        "guidance shares the encoder between its two halves", "fused", build=partial(_form, {"channels_last": False})
    ),
    "channels_last": Rung(
        "channels_last; on the CPU oneDNN's own layout for weights", "fused", build=partial(_form, {"winograd": False})
    ),
    "winograd": Rung("3x3 convolutions with a quarter of the products: engine `fused`", "fused", native=True),
    "compile": Rung("torch.compile of network, noise and update: engine `compile`", "compile"),
    "bf16": Rung("the network in bfloat16", "compile", torch.bfloat16, _bfloat16),
    "graph": Rung("engine `fused` in bfloat16 as a CUDA graph: engine `graph`", "graph", torch.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Job:
    """What every rung has to do: sample `batch` images of a run, the classes in turn, with Philox noise of a seed."""

    run: Run
    table: StepTable
    batch: int
    guidance: float
    device: torch.device
    seed: int = 0

    @property
    def head(self) -> StepTable:
        """The rows that are timed."""
        rows = slice(TIMED_STEPS)
        return StepTable(self.table.timesteps[rows], self.table.coefficients[rows], self.table.clip)

    def call(
        self,
        rung: Rung,
        table: StepTable,
        *,
        first_sample: int = 0,
        state: torch.dtype = torch.float32,
        callback: Callback | None = None,
    ) -> Call:
        """A function without arguments that runs the table and returns x [batch, C, H, W].

        state: the type of x; float64 also makes the network float64.
        """
        model = self.run.model
        samples = torch.arange(first_sample, first_sample + self.batch, device=self.device)
        context = torch.eye(model.n_cfeat, device=self.device)[samples % model.n_cfeat] if model.n_cfeat else None
        noise = PhiloxNoise(self.seed, state)
        dtype = torch.float64 if state == torch.float64 else rung.dtype
        with torch.no_grad():
            x = noise(samples, 0, Stream.INITIAL, model.sample_shape)
            build = rung.build or choose(rung.engine, self.device, dtype)
            engine = build(model, self.run.schedule.timesteps, table, dtype)

        def call() -> Tensor:
            with torch.no_grad():
                return engine(x.clone(), samples, context, self.guidance, noise, callback)

        return call

    @cached_property
    def cost(self) -> Cost:
        """Of the timed steps in eager form: weights read once a step, the state read and written."""
        model, shape = self.run.model, self.run.model.sample_shape
        rows = self.batch * (2 if self.guidance != 1.0 else 1)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            context = torch.empty(1, model.n_cfeat) if model.n_cfeat else None
            copy.deepcopy(model).to("meta")(torch.empty(1, *shape), torch.empty(1), context)
        steps = len(self.head)
        return Cost(steps * (weights + 8 * self.batch * prod(shape)), steps * rows * counter.get_total_flops())


def workload(name: str, job: Job) -> Workload:
    """A rung beside eager in one process; its parity is of the steps that are timed."""
    rung = RUNGS[name]

    def build(device: torch.device) -> Bench:
        reference = job.call(RUNGS[EAGER], job.head)
        candidate = Candidate(
            lambda: job.call(rung, job.head),
            lambda call: engine_error(call(), reference(), rung.dtype),
            PARITY[rung.dtype],
        )
        return Bench([()], reference, {name: candidate}, job.cost, calls=len(job.head))

    return Workload(f"ladder/{name}", "ladder", build)
