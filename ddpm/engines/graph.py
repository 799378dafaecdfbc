"""The graph engine: several steps of the fused engine as one CUDA graph.

Step index, table, seed, sample indices and conditions live in device memory, and the graph itself advances the index,
so a replay needs nothing from the host. A capture is for one batch size and serves every table, seed and context; it
reads the folded weights where they lie, so `refresh` reaches it.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Chunk, FormOf, engine
from ddpm.engines.fused import FusedEngine
from ddpm.inference import at, halves
from ddpm.inference.form import Rows
from ddpm.noise import PhiloxNoise
from ddpm.precision import float32_on_cuda
from kernels import guidance_rescale, solver_step

STEPS_PER_GRAPH = 10  # untuned
WARM_UP_STEPS = 3
CAPTURES_KEPT = 4  # batch sizes whose captures are kept per network: full and last chunk, guided and not
_capturing = Lock()  # a stream takes one capture at a time


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for every stream that it was called on."""
    return torch.cuda.Stream(device)


def warm_up(device: torch.device, step: Callable[[], None]) -> torch.cuda.Stream:
    """Run what shall be captured a few times, as PyTorch asks for: it allocates, compiles and tunes. -> the stream."""
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    return side


class Capture:
    """Static buffers for n samples and the graphs of one and of STEPS_PER_GRAPH steps over them."""

    def __init__(
        self,
        by: "GraphEngine",
        x: Tensor,
        tables: tuple[Tensor, ...],
        rows: Rows,
        one_each: tuple[int, ...],
        rescales: bool,
        keeps_x0: bool,
    ) -> None:
        self.form, self.clip, room = by.form, by.table.clip, by.room
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        self.x = torch.zeros_like(x, memory_format=layout)
        self.x0 = torch.zeros_like(self.x) if keeps_x0 else None
        self.recalled = (self.x0,) if by.recalls else ()
        self.samples = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.seed = torch.zeros((), dtype=torch.int64, device=x.device)
        self.guidance = torch.ones(room, *one_each, dtype=torch.float32, device=x.device)
        self.rescale = torch.zeros((), dtype=torch.float32, device=x.device) if rescales else None
        self.table = torch.zeros(room, 8, device=x.device)
        self.tables = tuple(table.new_zeros(room, *table.shape[1:]) for table in tables)
        self.rows = None if rows is None else tuple(torch.zeros_like(row) for row in rows)

        def first() -> None:
            self.index.zero_()  # a table may have fewer rows
            self._step()

        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with _capturing:
            side = warm_up(x.device, first)
            pool = torch.cuda.graph_pool_handle()
            for steps in (1, STEPS_PER_GRAPH):
                self.graphs[steps] = graph = torch.cuda.CUDAGraph()
                # What other threads do meanwhile is no part of it, and no error.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    for _ in range(steps):
                        self._step()

    def _step(self) -> None:
        given = self.x, at(self.tables, self.index), self.rows, *self.recalled
        m, *uncond = self.form(*given).chunk(halves(self.rows))
        if uncond and self.rescale is not None:
            weights = self.guidance.index_select(0, self.index).flatten()
            m, uncond = guidance_rescale(m, uncond[0], weights, self.rescale), ()
        row = self.table, self.index, self.seed, self.samples
        solver_step(self.x, m, *row, uncond[0] if uncond else None, self.guidance, self.x0, self.clip)
        self.index.add_(1)

    def load(self, chunk: Chunk, rows: Rows, by_step: tuple[Tensor, ...]) -> None:
        """Fill buffers, which the graphs address; by_step: guidance, table, form's tables, each [S, ...]."""
        self.x.copy_(chunk.x)
        self.samples.copy_(chunk.samples)
        self.index.zero_()
        self.seed.fill_(chunk.noise.seed)
        if self.rescale is not None:
            self.rescale.fill_(chunk.rescale)
        if self.x0 is not None:
            self.x0.zero_()
        for own, given in zip((self.guidance, self.table, *self.tables), by_step, strict=True):
            own[: len(given)].copy_(given)
        for own, given in zip(self.rows or (), rows or (), strict=True):
            own.copy_(given)


@engine
class GraphEngine(FusedEngine):
    """CUDA only, with Philox noise, which the kernel draws. A callback costs replays of single steps and a state."""

    name = "graph"

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        super().prepare(model, form)
        self.room = max(self.count, len(self.table))  # a capture serves every table of up to T rows
        if not hasattr(self.form, "captures"):
            self.form.captures = OrderedDict()

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        if device.type != "cuda":
            return f"a CUDA device, the model is on {device}"
        if custom_noise or dtype == torch.float64:
            return "Philox noise and a state in float32, which its kernel draws and holds"
        return super().lacks(device, dtype, custom_noise)

    def run(self, chunk: Chunk) -> Tensor:
        x, callback = chunk.x, chunk.callback
        if not (isinstance(chunk.noise, PhiloxNoise) and x.dtype == torch.float32):
            raise ValueError("engine: 'graph' draws Philox noise in float32, needs noise=None and no dtype float64")
        tables, rows = self.tables(x.device), self.rows(chunk)
        weights = self.weights(chunk)
        made_for = weights.shape[1:], chunk.rescale is not None, self.memory or callback is not None
        key, captures = self._key(x, rows, made_for), self.form.captures
        with torch.cuda.device(x.device):
            # Nobody else's while its buffers are in use: neither another thread's nor a callback's that samples.
            capture = captures.pop(key, None)
            if capture is None:
                while len(captures) >= CAPTURES_KEPT:
                    captures.popitem(last=False)
                capture = Capture(self, x, tables, rows, *made_for)
            capture.load(chunk, rows, (weights, self.table.rows(x.device), *tables))
            done, count = 0, len(self.table)
            while done < count:
                some = STEPS_PER_GRAPH if callback is None and count - done >= STEPS_PER_GRAPH else 1
                capture.graphs[some].replay()
                done += some
                if callback is not None:
                    callback(done - 1, capture.x0)
            x = capture.x.clone()
        captures[key] = capture
        return x

    def _key(self, x: Tensor, rows: Rows, made_for: tuple[object, ...]) -> tuple[object, ...]:
        """What a capture serves."""
        shapes = None if rows is None else tuple(row.shape for row in rows)
        # Where the weights lie: a graph reads the memory that it was captured with.
        weights = tuple(tensor.data_ptr() for tensor in (*self.form.parameters(), *self.form.buffers()))
        return x.shape, shapes, self.room, made_for, self.table.clip, weights, float32_on_cuda()
