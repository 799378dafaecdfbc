"""The fused engine: the inference form of the network, and the solver's update in one kernel."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Chunk, Engine, FormOf, engine, guided, shaped
from ddpm.inference import at, halves, hooks_every_module
from ddpm.inference.form import Layout, Rows
from ddpm.noise import PhiloxNoise, RowNoise
from kernels import backend, guidance_rescale, solver_step
from kernels.solver_step import reference

# update(i, x, m, m_uncond, x0_previous) -> (x, x0): row i of the table.
Update = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


@engine
class FusedEngine(Engine):
    """Runs the table on the form; the update is the operator `solver_step` (CUDA, Philox noise) or its reference."""

    name = "fused"
    layout: ClassVar[Layout | None] = None  # of the form, None: its own

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        self.form = form(model, self.dtype) if self.layout is None else form(model, self.dtype, layout=self.layout)
        self.live = self.form.live
        self._tables: tuple[Tensor, ...] | None = None

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        if device.type == "cuda" and dtype == torch.float64:
            return "another type than float64 on CUDA, which its kernels do not compute in: take eager"
        if device.type == "cuda" and backend.triton is None:
            return "Triton, which is not installed"
        if hooks_every_module():
            return "a process without forward hooks on every module: take eager"
        return None

    def refresh(self, model: nn.Module) -> None:
        self.form.refresh(model)
        self._tables = None

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """The form's tables of all steps, made once."""
        if self._tables is None or self._tables[0].device != device:
            self._tables = self.form.tables(self.times.to(device))
        return self._tables

    def rows(self, chunk: Chunk) -> Rows:
        """Of both halves where the chunk is guided; negative conditions are rows like the others."""
        n = len(chunk.x)
        if not chunk.guided or chunk.negative is None:
            return self.form.rows(chunk.context, n, chunk.guided)
        rows = self.form.rows(torch.cat((chunk.context, chunk.negative)), 2 * n, False)
        return None if rows is None else tuple(row.reshape(2, n, *row.shape[2:]) for row in rows)

    def run(self, chunk: Chunk) -> Tensor:
        x = chunk.x
        tables, rows = self.tables(x.device), self.rows(chunk)
        by_kernel = x.is_cuda and x.dtype == torch.float32 and isinstance(chunk.noise, PhiloxNoise)
        update = self.in_kernel(chunk) if by_kernel else self.update(chunk)
        previous = torch.zeros_like(x) if self.recalls or (self.memory and not by_kernel) else None
        for i, index in enumerate(torch.arange(len(self.table), device=x.device).split(1)):
            recalled = (previous,) if self.recalls else ()
            m, *uncond = self.network(x, at(tables, index), rows, *recalled).chunk(halves(rows))
            x, x0 = update(i, x, m, uncond[0] if uncond else None, previous)
            previous = x0 if self.memory else None
            if chunk.callback is not None:
                chunk.callback(i, x0)
        return x

    def network(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows, *recalled: Tensor) -> Tensor:
        return self.form(x, table_row, rows, *recalled)

    def in_kernel(self, chunk: Chunk) -> Update:
        """The update by the operator, in place on a copy of x; it keeps the x0 before it itself."""
        x, samples = chunk.x, chunk.samples
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        own = x.clone(memory_format=layout)
        keeps_x0 = self.memory or chunk.callback is not None
        rows, x0 = self.table.rows(x.device), torch.zeros_like(own) if keeps_x0 else None
        indices = torch.arange(len(self.table), device=x.device).split(1)
        seed = torch.full((), chunk.noise.seed, device=x.device)
        weights = self.weights(chunk)

        def update(i: int, _: Tensor, m: Tensor, uncond: Tensor | None, __: Tensor | None) -> tuple[Tensor, ...]:
            if uncond is not None and chunk.rescale is not None:
                m, uncond = guidance_rescale(m, uncond, weights[i], chunk.rescale), None
            return solver_step(own, m, rows, indices[i], seed, samples, uncond, weights, x0, self.table.clip), x0

        return update

    def update(self, chunk: Chunk) -> Update:
        """The update by the operator's reference, with noise that is drawn before."""
        x = chunk.x
        rows = [row.unbind() for row in self.table.rows(x.device, x.dtype)[:, :7]]
        weights = [shaped(weight, x) for weight in self.table.weights_of_guidance(chunk.guidance)]
        draws = RowNoise(chunk.noise, chunk.samples, self.table, tuple(x.shape[1:]))

        def update(i: int, x: Tensor, m: Tensor, uncond: Tensor | None, previous: Tensor | None) -> tuple[Tensor, ...]:
            m = m.to(x.dtype)
            if uncond is not None:
                m = guided(m, uncond.to(x.dtype), weights[i], chunk.rescale)
            z = draws(i) if self.noisy[i] else None
            return reference(x, m, rows[i], z, previous, self.table.clip)

        return update
