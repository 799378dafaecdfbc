"""Suite `cuda`: the step on a GPU, as `ddpm-bench gpu` measures it; also `ddpm-bench run --suite bench/suites/cuda.py`.

A call is a trajectory of ddpm rows, times are per step. The reference is the eager engine in float32, without TF32, as
are all but "eager tf32", what PyTorch's defaults give. Every candidate is judged against the reference.

ROW/engines has our engines that are ready in seconds. ROW/autotune-TYPE has what a user of PyTorch can do without our
engines: network, the contract's noise and update of one step by torch.compile(mode="max-autotune"), minutes, beside
`compile`, `graph` and `kernels` in the same type. The most important candidates come first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from bench.kernels import full_precision
from bench.registry import Bench, Candidate, Unavailable, Workload
from bench.suites.networks import (
    AUTOTUNE,
    CHANNELS,
    PARITY,
    SEED,
    TIMESTEPS,
    contexts,
    forward_flops,
    network,
    step_bytes,
)
from ddpm import NoiseSchedule, StepTable, Trajectory, make_table
from ddpm.engines import unavailable_reason
from ddpm.inference import KERNELS as KERNELS_LAYOUT
from ddpm.inference import Form, make_form
from ddpm.metrics import engine_error
from ddpm.networks import network_times
from ddpm.networks.protocol import in_type, null_condition
from ddpm.noise import PhiloxNoise
from kernels import philox
from kernels.backend import Cost
from kernels.solver_step import guide, reference

# What a call does once (the conditions of all steps, copies into a graph: 0.4 ms by estimate) is spread over so many
# steps: 500 in use, and 500 of them take eager seconds.
STEPS = 100
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TF32 = "eager tf32"  # candidate
KERNELS = "kernels"  # the graph engine on the form with one kernel per convolution, which no engine takes by itself
QUICK = (
    ("graph", "bf16"),
    (KERNELS, "bf16"),
    ("graph", "fp32"),
    ("graph", "fp16"),
    (KERNELS, "fp16"),
    ("fused", "bf16"),
    ("fused", "fp32"),
)


@dataclass(frozen=True)
class Row:
    """What is sampled: images at a time, their side, w of guidance, rows of the table."""

    name: str
    batch: int
    side: int = 16
    guidance: float = 1.0
    steps: int = STEPS


# In the order of importance; at 1024 images and at 256x256 a step is long.
ROWS = (
    Row("batch1", 1),
    Row("batch64", 64),
    Row("batch64-guided", 64, guidance=2.0),
    Row("batch1024", 1024, steps=50),
    Row("256x256-batch16", 16, side=256, steps=10),
)
CHUNK = 256  # images at a time of `ddpm.sample` at 16x16
SCHEDULE = NoiseSchedule.make("linear", TIMESTEPS)


class Step(nn.Module):
    """One step, whole, in plain torch operators: (x float32 [n, C, h, w], index int64 [1]) -> the next x.

    Its buffers are where CUDA graphs of torch.compile need no copies.
    """

    def __init__(
        self, row: Row, table: StepTable, dtype: torch.dtype, samples: Tensor, context: Tensor, device: torch.device
    ) -> None:
        super().__init__()
        self.model = network(device, row.side).to(dtype, memory_format=torch.channels_last)
        self.guidance, self.dtype, self.clip = row.guidance, dtype, table.clip
        if row.guidance != 1.0:
            context = torch.cat((context, null_condition(self.model, context)))
        self.register_buffer("context", context.to(dtype))
        self.register_buffer("samples", samples)
        self.register_buffer("table", table.rows(device))
        times = network_times(self.model, table.timesteps, TIMESTEPS)
        self.register_buffer("times", in_type(times, dtype).to(device))
        self.register_buffer("seed", torch.full((), SEED, device=device))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Noise is that of the noise contract; the last row multiplies it by zero."""
        row = self.table.index_select(0, index)[0]
        inputs = x.to(self.dtype)
        inputs = inputs if self.guidance == 1.0 else torch.cat((inputs, inputs))
        t = self.times.index_select(0, index).expand(inputs.shape[0])
        m = self.model(inputs, t, self.context).to(x.dtype)
        if self.guidance != 1.0:
            m = guide(*m.chunk(2), self.guidance)
        step, shape = row[7].to(torch.int64), tuple(x.shape[1:])
        z = philox.normal(self.seed, self.samples, step, philox.Stream.SAMPLING, shape, device=x.device)
        return reference(x, m, row[:7].unbind(), z, None, self.clip)[0]


def compiled(step: Step) -> Callable[[Tensor, Tensor], Tensor]:
    """The step through torch.compile at its strongest, which also captures CUDA graphs."""
    return torch.compile(step, mode=AUTOTUNE, fullgraph=True, dynamic=False)


def _setting(row: Row, device: torch.device, steps: int) -> tuple[StepTable, Tensor, Tensor, Tensor]:
    """(table, sample indices, context, x_T)."""
    table = make_table(SCHEDULE, "ddpm", steps)
    samples = torch.arange(row.batch, device=device)
    x = PhiloxNoise(SEED)(samples, 0, philox.Stream.INITIAL, (CHANNELS, row.side, row.side))
    return table, samples, contexts(row.batch, device), x


def kernels_form(model: nn.Module, dtype: torch.dtype) -> Form:
    """The form with one kernel per convolution."""
    return make_form(model, dtype, KERNELS_LAYOUT)


def trajectory(
    row: Row,
    engine: str,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    chunk: int | None = None,
    tf32: bool = False,
) -> Callable[[], Tensor]:
    """A call that samples with an engine or KERNELS, `chunk` images at a time [all]. tf32: of convolutions."""
    table, _, context, x = _setting(row, device, steps)
    model, kind, form = network(device, row.side), engine, make_form
    if engine == KERNELS:
        kind, form = "graph", kernels_form
    run = Trajectory(model, SCHEDULE, table, engine=kind, dtype=dtype, guided=row.guidance != 1.0, form=form)

    def call() -> Tensor:
        with full_precision(convolutions=not tf32):
            return run(row.batch, context, row.guidance, SEED, batch_size=chunk or row.batch, x_T=x)

    return call


def autotuned(row: Row, dtype: torch.dtype, device: torch.device, steps: int) -> Callable[[], Tensor]:
    """A call that samples with the compiled `Step`, as its users are told to: a new iteration each step, a copy."""
    table, samples, context, x = _setting(row, device, steps)
    step = compiled(Step(row, table, dtype, samples, context, device))
    indices = [torch.full((1,), i, device=device) for i in range(steps)]

    def call() -> Tensor:
        with torch.no_grad(), full_precision():
            state = x
            for index in indices:
                torch.compiler.cudagraph_mark_step_begin()
                state = step(state, index).clone()
            return state

    return call


def _build(row: Row, kind: str, device: torch.device) -> Bench:
    """kind: "engines" or a key of TYPES."""
    model = network(device, row.side)
    eager = trajectory(row, "eager", torch.float32, device, row.steps)
    expected = cache(eager)

    def entry(make: Callable[[], Callable[[], Tensor]], dtype: torch.dtype) -> Candidate:
        return Candidate(make, lambda call: engine_error(call(), expected(), dtype), PARITY[dtype])

    def engine(name: str, dtype: torch.dtype, **how: int) -> Candidate:
        return entry(partial(trajectory, row, name, dtype, device, row.steps, **how), dtype)

    candidates: dict[str, Candidate] = {}
    if kind == "engines":
        candidates = {f"{name} {label}": engine(name, TYPES[label]) for name, label in QUICK if _runs(name, device)}
        for name in ("graph", KERNELS):
            if row.batch > CHUNK and _runs(name, device):
                candidates[f"{name} bf16 {CHUNK} at a time"] = engine(name, torch.bfloat16, chunk=CHUNK)
        # TF32 keeps ten bits of a product's factors, as float16 does.
        candidates[TF32] = Candidate(
            partial(trajectory, row, "eager", torch.float32, device, row.steps, tf32=True),
            lambda call: engine_error(call(), expected(), torch.float16),
            PARITY[torch.float16],
        )
    else:
        dtype = TYPES[kind]
        # The form with kernels is for 16-bit types.
        for name in ("graph", KERNELS) if kind == "bf16" else ("graph",):
            if _runs(name, device):
                candidates[f"{name} {kind}"] = engine(name, dtype)
        candidates[f"{AUTOTUNE} {kind}"] = entry(partial(autotuned, row, dtype, device, row.steps), dtype)
        candidates[f"compile {kind}"] = engine("compile", dtype)
    calls = row.steps * (1 if row.guidance == 1.0 else 2)
    cost = Cost(row.steps * step_bytes(model, row.batch, torch.float32), calls * row.batch * forward_flops(row.side))
    return Bench([()], eager, candidates, cost, calls=row.steps, images=row.batch)


def _runs(engine: str, device: torch.device) -> bool:
    return unavailable_reason("graph" if engine == KERNELS else engine, device) is None


def workloads(quick: bool, device: torch.device | None = None, rows: Sequence[Row] = ROWS) -> list[Workload]:
    """Engines of all rows, then max-autotune in bf16, then in fp32. Raises Unavailable where there is no GPU.

    quick: without max-autotune. device: where, if the caller knows.
    """
    if device is None and not torch.cuda.is_available():
        raise Unavailable("suite cuda: needs a CUDA device, this PyTorch sees none")
    kinds = (
        {"engines": "engines"} if quick else {"engines": "engines", "bf16": "autotune-bf16", "fp32": "autotune-fp32"}
    )
    return [
        Workload(f"cuda/{row.name}/{label}", "cuda", partial(_build, row, kind))
        for kind, label in kinds.items()
        for row in rows
    ]
