"""The rungs: eager -> folded -> tables -> shared -> channels_last -> winograd -> compile -> bf16 (-> graph, on CUDA).

Each has everything of the rung above and one thing more, so the difference of two rungs is what that one thing brings.
What is timed are the first TIMED_STEPS rows of the very trajectory whose quality is judged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import nn

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import PARITY, flops_of, step_bytes
from bench.timing import Call
from ddpm.commands.drawing import ALL, class_count, contexts_of
from ddpm.engines import missing
from ddpm.engines.engine import Callback, FormOf
from ddpm.inference import FORMS, Form, Layout, make_form
from ddpm.inference.context_unet import fold_batch_norm
from ddpm.metrics import engine_error
from ddpm.noise import PhiloxNoise
from ddpm.precision import computed_in
from ddpm.runs import Run
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory
from kernels.backend import Cost
from kernels.philox import Stream
from kernels.winograd import missing as kernel_missing

EAGER = "eager"
# Five steps' noise of 32 samples is one draw of the fused engine, see `ddpm.noise.AHEAD`.
TIMED_STEPS = 5


@dataclass(frozen=True)
class Rung:
    """adds: what it has beyond the rung above. engine: the name in `ddpm.engines` that the machine must be able to run.

    form: how its engine comes by the form. network: what is done to the network before. native: whether it is the
    operator `winograd`.
    """

    adds: str
    engine: str
    dtype: torch.dtype = torch.float32
    form: FormOf = make_form
    network: Callable[[nn.Module], nn.Module] = lambda model: model
    native: bool = False

    def missing(self, device: torch.device) -> str | None:
        """What this machine lacks to run it, or None."""
        if self.native and device.type != "cpu":
            return f"a CPU, the model is on {device}"
        return missing(self.engine, device, self.dtype) or (kernel_missing() if self.native else None)

    def trajectory(self, run: Run, table: StepTable, dtype: torch.dtype, guided: bool) -> Trajectory:
        """Prepared to run the table. What computes in an emulated type is not compiled."""
        device = next(run.model.parameters()).device
        engine = self.engine if computed_in(dtype, device) == dtype else "fused"
        network = self.network(run.model)
        return Trajectory(network, run.schedule, table, engine=engine, dtype=dtype, guided=guided, form=self.form)


def _laid_out(layout: Layout) -> FormOf:
    return lambda model, dtype: make_form(model, dtype, layout)


def _in_this_type(model: nn.Module, dtype: torch.dtype) -> Form:
    """The form even in a type in place of which engines take float32, because it is emulated."""
    return FORMS[type(model)](model, dtype)


RUNGS = {
    EAGER: Rung("module, table, plain torch operators", "eager"),
    "folded": Rung("BatchNorm folded into its convolution", "eager", network=fold_batch_norm),
    "tables": Rung(
        "embeddings of time and context computed once a run; no concatenation before ConvTranspose; noise drawn ahead",
        "fused",
        form=_laid_out(Layout(channels_last=False, shared=False)),
    ),
    "shared": Rung(
        "guidance shares the encoder between its two halves", "fused", form=_laid_out(Layout(channels_last=False))
    ),
    "channels_last": Rung(
        "channels_last; on the CPU oneDNN's own layout for weights", "fused", form=_laid_out(Layout(winograd=False))
    ),
    "winograd": Rung("3x3 convolutions with a quarter of the products: engine `fused`", "fused", native=True),
    "compile": Rung("torch.compile of network, noise and update: engine `compile`", "compile"),
    "bf16": Rung("the network in bfloat16", "compile", torch.bfloat16, _in_this_type),
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
        names = ("timesteps", "coefficients", "guidance_scale", "noise_steps", "begins")
        return replace(self.table, **{name: getattr(self.table, name)[:TIMED_STEPS] for name in names})

    def call(
        self,
        rung: Rung,
        table: StepTable,
        *,
        first_sample: int = 0,
        exact: bool = False,
        callback: Callback | None = None,
    ) -> Call:
        """A function without arguments that runs the table and returns float32 [batch, C, H, W].

        exact: computed in float64 throughout.
        """
        dtype = torch.float64 if exact else rung.dtype
        prepared = rung.trajectory(self.run, table, dtype, guided=self.guidance != 1.0)
        samples = torch.arange(first_sample, first_sample + self.batch, device=self.device)
        noise = PhiloxNoise(self.seed, prepared.state_dtype)
        x = noise(samples, 0, Stream.INITIAL, prepared.shape)
        context = contexts_of(self.run, ALL if class_count(self.run) else None, first_sample, self.batch)
        context = None if context is None else context.to(self.device)
        more = {"batch_size": self.batch, "x_T": x, "callback": callback}
        return partial(prepared, self.batch, context, self.guidance, self.seed, first_sample, **more)

    @cached_property
    def cost(self) -> Cost:
        """Of the timed steps in eager form: weights read once a step, the state read and written."""
        model, steps = self.run.model, len(self.head)
        rows = self.batch * (2 if self.guidance != 1.0 else 1)
        return Cost(steps * step_bytes(model, self.batch, torch.float32), steps * rows * flops_of(model))


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
