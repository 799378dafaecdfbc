"""The eager engine: module, table, plain torch operators. It is the specification of the others."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm.solvers import StepTable
from kernels import philox
from kernels.solver_step import guide, reference


class EagerEngine:
    """Runs the table row by row, the network as it is; guidance calls it on twice the rows."""

    def __init__(self, model: nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype) -> None:
        kind = next(model.parameters(), torch.empty(0, dtype=dtype)).dtype
        self.model = model if kind == dtype else copy.deepcopy(model).to(dtype)
        self.table, self.dtype = table, dtype
        self.steps = table.timesteps.tolist()
        self.times = [t / timesteps for t in self.steps]
        self.noisy = (table.coefficients[:, 6] != 0).tolist()

    def __call__(
        self,
        x: Tensor,
        samples: Tensor,
        context: Tensor | None,
        guidance: float,
        noise: Callable[..., Tensor],
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """x [n, ...] at t = timesteps[0] -> x at t = 0. Arguments as in `ddpm.sampling.sample`."""
        rows = self.table.rows(x.device, x.dtype)
        x0 = torch.zeros_like(x)
        for i, (step, time) in enumerate(zip(self.steps, self.times, strict=True)):
            m = self._output(x, time, context, guidance)
            z = noise(samples, step, philox.Stream.SAMPLING, tuple(x.shape[1:])) if self.noisy[i] else None
            x, x0 = reference(x, m, rows[i, :7].unbind(), z, x0, self.table.clip)
            if callback is not None:
                callback(i, x0)
        return x

    def _output(self, x: Tensor, time: float, context: Tensor | None, guidance: float) -> Tensor:
        """The network's output, guided. Both halves of guidance are one call of [2n, ...] rows.

        So a single guided sample is a batch of two: PyTorch convolves a batch of one on the CPU by another algorithm,
        whose rounding (6.4e-7 against 1.8e-7) guidance would blow up to 1.8e-5 over a trajectory, measured on the
        sprites run with guidance 2.
        """
        if guidance == 1.0 or context is None:
            return self._network(x, time, context)
        both = self._network(torch.cat((x, x)), time, torch.cat((context, torch.zeros_like(context))))
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, guidance)

    def _network(self, x: Tensor, time: float, context: Tensor | None) -> Tensor:
        t = torch.full((x.shape[0],), time, dtype=self.dtype, device=x.device)
        c = None if context is None else context.to(self.dtype)
        m = self.model(x.to(self.dtype), t, c)
        if m.shape != x.shape:
            raise ValueError(f"model: returned {list(m.shape)}, needs the shape of x {list(x.shape)}")
        return m.to(x.dtype)
