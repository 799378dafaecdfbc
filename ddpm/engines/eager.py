"""The eager engine: module, table, plain torch operators. It is the specification of the others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm.solvers import StepTable
from kernels import philox
from kernels.solver_step import guide, reference


class EagerEngine:
    """Runs the table row by row, the network as it is; guidance calls it twice."""

    def __init__(self, model: nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype) -> None:
        self.model, self.table, self.dtype = model, table, dtype
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
            t = torch.full((x.shape[0],), time, dtype=self.dtype, device=x.device)
            m = self._network(x, t, context)
            if guidance != 1.0:
                m = guide(m, self._network(x, t, None), guidance)
            z = noise(samples, step, philox.Stream.SAMPLING, tuple(x.shape[1:])) if self.noisy[i] else None
            x, x0 = reference(x, m, rows[i, :7].unbind(), z, x0, self.table.clip)
            if callback is not None:
                callback(i, x0)
        return x

    def _network(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        c = None if context is None else context.to(self.dtype)
        return self.model(x.to(self.dtype), t, c).to(x.dtype)
