"""What engines share that prepare a step once and replay it: `graph` on CUDA, `native` on CPUs.

A `State` has static buffers for a batch size and the step that reads and writes them. It serves every table, seed and
condition, and reads the folded weights where they lie, so `refresh` reaches it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Chunk, FormOf, only_counts
from ddpm.engines.fused import FusedEngine
from ddpm.inference import halves
from ddpm.inference.form import Rows
from ddpm.noise import PhiloxNoise
from ddpm.precision import float32_on_cuda
from kernels import guidance_rescale, solver_step

STATES_KEPT = 4  # batch sizes that are kept per network: full and last chunk, guided and not


class State:
    """Buffers for n samples, and one step over them."""

    def __init__(
        self,
        by: "ReplayingEngine",
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

    def step(self, at: Callable[[Tensor], Tensor], table: Tensor, guidance: Tensor) -> None:
        """One row. at: the present row [1, ...] of what has one for each; table, guidance: which `index` is for."""
        given = self.x, tuple(map(at, self.tables)), self.rows, *self.recalled
        m, *uncond = self.form(*given).chunk(halves(self.rows))
        if uncond and self.rescale is not None:
            m, uncond = guidance_rescale(m, uncond[0], at(self.guidance).flatten(), self.rescale), ()
        row = table, self.index, self.seed, self.samples
        solver_step(self.x, m, *row, uncond[0] if uncond else None, guidance, self.x0, self.clip)

    def load(self, chunk: Chunk, rows: Rows, by_step: tuple[Tensor, ...]) -> None:
        """Fill the buffers; by_step: guidance, table, form's tables, each [S, ...]."""
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

    def replay(self, count: int, singly: bool) -> Iterator[int]:
        """Run `count` rows from the first; yields how many are done now and then, after each where `singly`."""
        raise NotImplementedError


class States(OrderedDict):
    """By what they serve. Empty in a copy and where it is pickled: states read memory of this process and form."""

    def __reduce__(self) -> tuple[type["States"], tuple[()]]:
        return States, ()


class ReplayingEngine(FusedEngine):
    """The state of a batch size is made at the first call of that size. state: what makes it."""

    state: ClassVar[type[State]]

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        super().prepare(model, form)
        self.room = max(self.count, len(self.table))  # a state serves every table of up to T rows
        if not hasattr(self.form, "states"):
            self.form.states = States()

    def run(self, chunk: Chunk) -> Tensor:
        x, callback = chunk.x, chunk.callback
        if not (isinstance(chunk.noise, PhiloxNoise) and x.dtype == torch.float32):
            raise ValueError(
                f"engine: {self.name!r} draws Philox noise in float32, needs noise=None and no other dtype"
            )
        tables, rows = self.tables(x.device), self.rows(chunk)
        weights = self.weights(chunk)
        counts = callback is None or only_counts(callback)
        made_for = weights.shape[1:], chunk.rescale is not None, self.memory or not counts
        key, states = self._key(x, rows, made_for), self.form.states
        # Nobody else's while its buffers are in use: neither another thread's nor a callback's that samples.
        state = states.pop(key, None)
        if state is None:
            while len(states) >= STATES_KEPT:
                states.popitem(last=False)
            state = self.state(self, x, tables, rows, *made_for)
        state.load(chunk, rows, (weights, self.table.rows(x.device), *tables))
        for done in state.replay(len(self.table), not counts):
            if callback is not None:
                callback(done - 1, None if counts else state.x0)
        x = state.x.clone()
        states[key] = state
        return x

    def _key(self, x: Tensor, rows: Rows, made_for: tuple[object, ...]) -> tuple[object, ...]:
        """What a state serves."""
        shapes = None if rows is None else tuple(row.shape for row in rows)
        # Where the weights lie: they are read from the memory that a state was made with.
        weights = tuple(tensor.data_ptr() for tensor in (*self.form.parameters(), *self.form.buffers()))
        return self.state, x.shape, shapes, self.room, made_for, self.table.clip, weights, float32_on_cuda()
