"""The graph engine: several steps of the fused engine as one CUDA graph.

Step index, table, seed, sample indices and conditions live in device memory, and the graph itself advances the index,
so a replay needs nothing from the host. A capture is for one batch size and serves every table, seed and context; it
reads the folded weights where they lie, so `refresh` reaches it.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm.engines.fused import FusedEngine
from ddpm.inference import Conditions, Form
from ddpm.noise import Noise, PhiloxNoise
from ddpm.solvers import StepTable
from kernels import solver_step

STEPS_PER_GRAPH = 10  # untuned
WARM_UP = 3
CAPTURES = 4  # batch sizes whose captures are kept per network: full and last chunk, guided and not


class Capture:
    """Static buffers for n samples and the graphs of one and of STEPS_PER_GRAPH steps over them."""

    def __init__(
        self, form: Form, x: Tensor, conditions: Conditions, timesteps: int, keeps_x0: bool, clip: float | None
    ) -> None:
        self.form, self.clip = form, clip
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        self.x = torch.zeros_like(x, memory_format=layout)
        self.x0 = torch.zeros_like(self.x) if keeps_x0 else None
        self.samples = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.seed = torch.zeros((), dtype=torch.int64, device=x.device)
        self.guidance = torch.ones((), dtype=torch.float32, device=x.device)
        # Room for every table: S <= T.
        self.table = torch.zeros(timesteps, 8, device=x.device)
        tables = tuple(table.new_zeros(timesteps, *table.shape[1:]) for table in conditions.tables)
        rows = None if conditions.rows is None else tuple(torch.zeros_like(row) for row in conditions.rows)
        self.conditions = Conditions(tables, rows)
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.index.zero_()  # a table may have fewer rows
                self._step()
        torch.cuda.current_stream(x.device).wait_stream(side)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for steps in (1, STEPS_PER_GRAPH):
            self.graphs[steps] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                for _ in range(steps):
                    self._step()

    def _step(self) -> None:
        m = self.form(self.x, self.conditions.at(self.index), self.conditions.rows)
        m, *uncond = m.chunk(self.conditions.halves)
        solver_step(
            self.x,
            m,
            self.table,
            self.index,
            self.seed,
            self.samples,
            uncond[0] if uncond else None,
            self.guidance,
            self.x0,
            self.clip,
        )
        self.index.add_(1)

    def load(
        self, x: Tensor, samples: Tensor, seed: int, guidance: float, table: Tensor, conditions: Conditions
    ) -> None:
        """Fill the buffers for a run. Copies only: their addresses are in the graphs."""
        self.x.copy_(x)
        self.samples.copy_(samples)
        self.index.zero_()
        self.seed.fill_(seed)
        self.guidance.fill_(guidance)
        if self.x0 is not None:
            self.x0.zero_()
        steps = table.shape[0]
        self.table[:steps].copy_(table)
        for own, given in zip(self.conditions.tables, conditions.tables, strict=True):
            own[:steps].copy_(given)
        for own, given in zip(self.conditions.rows or (), conditions.rows or (), strict=True):
            own.copy_(given)


class GraphEngine(FusedEngine):
    """CUDA only. Arguments as `EagerEngine`; the noise must be Philox, which the kernel draws.

    A callback makes the engine replay single steps and costs a second state in memory. `form` as in `FusedEngine`.
    """

    def __init__(
        self, model: nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype, form: Form | None = None
    ) -> None:
        super().__init__(model, timesteps, table, dtype, form)
        self.timesteps = timesteps
        if not hasattr(self.form, "captures"):
            self.form.captures = OrderedDict()

    def __call__(
        self,
        x: Tensor,
        samples: Tensor,
        context: Tensor | None,
        guidance: float,
        noise: Noise,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """As `EagerEngine`."""
        if not (isinstance(noise, PhiloxNoise) and x.dtype == torch.float32):
            raise ValueError("engine: 'graph' draws Philox noise in float32, needs noise=None and no dtype float64")
        conditions = self.conditions(x, context, guidance)
        keeps_x0 = callback is not None or self.memory
        with torch.cuda.device(x.device):
            capture = self._capture(x, conditions, keeps_x0)
            capture.load(x, samples, noise.seed, guidance, self.table.rows(x.device), conditions)
            done, steps = 0, len(self.steps)
            while done < steps:
                some = STEPS_PER_GRAPH if callback is None and steps - done >= STEPS_PER_GRAPH else 1
                capture.graphs[some].replay()
                done += some
                if callback is not None:
                    callback(done - 1, capture.x0)
            return capture.x.clone()

    def _capture(self, x: Tensor, conditions: Conditions, keeps_x0: bool) -> Capture:
        captures = self.form.captures
        rows = None if conditions.rows is None else tuple(row.shape for row in conditions.rows)
        # Where the weights lie: a graph reads the memory that it was captured with.
        weights = tuple(tensor.data_ptr() for tensor in (*self.form.parameters(), *self.form.buffers()))
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        key = (x.shape, rows, self.timesteps, keeps_x0, self.table.clip, weights, tf32)
        if key in captures:
            captures.move_to_end(key)
        else:
            while len(captures) >= CAPTURES:
                captures.popitem(last=False)
            captures[key] = Capture(self.form, x, conditions, self.timesteps, keeps_x0, self.table.clip)
        return captures[key]
