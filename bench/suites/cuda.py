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
from bench.registry import Bench, Unavailable, Workload
from bench.suites import networks
from bench.suites.networks import AUTOTUNE, SCHEDULE, SEED, TIMESTEPS, contexts, judged, network, sampling_call
from bench.timing import Call
from ddpm import StepTable, make_table
from ddpm.engines import unavailable_reason
from ddpm.inference import KERNELS as KERNELS_LAYOUT
from ddpm.inference import make_form
from ddpm.networks import network_times
from ddpm.networks.protocol import in_type, null_condition
from kernels import philox
from kernels.solver_step import guide, reference

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TF32 = "eager tf32"  # candidate
KERNELS = "kernels"  # the graph engine on the form with one kernel per convolution, which no engine takes by itself
ENGINES = ("graph bf16", "kernels bf16", "graph fp32", "graph fp16", "kernels fp16", "fused bf16", "fused fp32")


@dataclass(frozen=True)
class Row:
    """What is sampled: images at a time, their side, w of guidance, rows of the table.

    What a call does once (the conditions of all steps, copies into a graph: 0.4 ms by estimate) is spread over them.
    """

    name: str
    batch: int
    side: int = 16
    guidance: float = 1.0
    steps: int = 100


# In the order of importance; at 1024 images and at 256x256 a step is long.
ROWS = (
    Row("batch1", 1),
    Row("batch64", 64),
    Row("batch64-guided", 64, guidance=2.0),
    Row("batch1024", 1024, steps=50),
    Row("256x256-batch16", 16, side=256, steps=10),
)
CHUNK = 256  # images at a time of `ddpm.sample` at 16x16


class Step(nn.Module):
    """One step, whole: (x float32 [n, C, h, w], index int64 [1]) -> the next x; torch.compile copies no buffers."""

    def __init__(self, row: Row, table: StepTable, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = network(device, row.side).to(dtype, memory_format=torch.channels_last)
        self.guidance, self.dtype, self.clip = row.guidance, dtype, table.clip
        context = contexts(row.batch, device)
        if row.guidance != 1.0:
            context = torch.cat((context, null_condition(self.model, context)))
        self.register_buffer("context", context.to(dtype))
        self.register_buffer("samples", torch.arange(row.batch, device=device))
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


def trajectory(
    row: Row, engine: str, dtype: torch.dtype, device: torch.device, chunk: int | None = None, tf32: bool = False
) -> Call:
    """A call that samples with an engine or KERNELS, `chunk` images at a time [all]. tf32: of convolutions."""
    table, model, how = make_table(SCHEDULE, "ddpm", row.steps), network(device, row.side), {}
    if engine == KERNELS:
        engine, how = "graph", {"form": partial(make_form, layout=KERNELS_LAYOUT)}
    run = sampling_call(model, table, row.batch, row.guidance, engine, dtype=dtype, **how)
    return full_precision(convolutions=not tf32)(partial(run, batch_size=chunk or row.batch))


def autotuned(row: Row, dtype: torch.dtype, device: torch.device) -> Call:
    """A call that samples with the compiled `Step`, as its users are told to: a new iteration each step, a copy."""
    step = Step(row, make_table(SCHEDULE, "ddpm", row.steps), dtype, device)
    x, advance = networks.initial(step.model, row.batch, device), compiled(step)
    indices = [torch.full((1,), i, device=device) for i in range(row.steps)]

    @torch.no_grad()
    @full_precision()
    def call() -> Tensor:
        state = x
        for index in indices:
            torch.compiler.cudagraph_mark_step_begin()
            state = advance(state, index).clone()
        return state

    return call


def _build(row: Row, kind: str, device: torch.device) -> Bench:
    """kind: "engines" or a key of TYPES."""
    eager = trajectory(row, "eager", torch.float32, device)
    expected = cache(eager)
    if kind == "engines":
        chunked = ("graph", KERNELS) if row.batch > CHUNK else ()
        names = [*ENGINES, *(f"{engine} bf16 {CHUNK} at a time" for engine in chunked), TF32]
    else:  # the form with kernels is for 16-bit types
        names = [f"{engine} {kind}" for engine in ("graph", KERNELS, AUTOTUNE, "compile")]
        names = [name for name in names if name != f"{KERNELS} fp32"]
    candidates = {}
    for name in names:
        engine, label, *chunk = name.split()
        dtype = TYPES.get(label, torch.float32)
        make = partial(trajectory, row, engine, dtype, device, CHUNK if chunk else None, tf32=name == TF32)
        if engine == AUTOTUNE:
            make = partial(autotuned, row, dtype, device)
        elif unavailable_reason("graph" if engine == KERNELS else engine, device) is not None:
            continue
        # TF32 keeps ten bits of a product's factors, as float16 does.
        candidates |= judged(expected, {name: make}, torch.float16 if name == TF32 else dtype)
    cost = networks.sampling_cost(network(device, row.side), row.batch, row.steps, row.guidance)
    return Bench([()], eager, candidates, cost, calls=row.steps, images=row.batch)


def workloads(quick: bool, device: torch.device | None = None, rows: Sequence[Row] = ROWS) -> list[Workload]:
    """Engines of all rows, then (not quick) max-autotune. Raises Unavailable without a GPU, unless told the device."""
    if device is None and not torch.cuda.is_available():
        raise Unavailable("suite cuda: needs a CUDA device, this PyTorch sees none")
    kinds = {"engines": "engines"} | ({} if quick else {"bf16": "autotune-bf16", "fp32": "autotune-fp32"})
    return [
        Workload(f"cuda/{row.name}/{label}", "cuda", partial(_build, row, kind))
        for kind, label in kinds.items()
        for row in rows
    ]
