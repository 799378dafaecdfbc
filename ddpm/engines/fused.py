"""The fused engine: the inference form of the network, and the solver's update in one kernel."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ddpm.inference import Conditions, Form, inference_form
from ddpm.noise import Noise, PhiloxNoise
from ddpm.solvers import StepTable
from kernels import philox, solver_step
from kernels.solver_step import guide, reference

# Normals drawn at a time on the CPU, where a step's noise at batch 1 is all overhead: 1.3 ms a step when drawn alone,
# next to 5 ms for the network.
AHEAD = 1 << 17

Advanced = tuple[Tensor, Tensor | None]
# advance(i, index, x, m, m_uncond) -> (x, x0): one row of the table.
Advance = Callable[..., Advanced]


class FusedEngine:
    """Runs the table on the inference form. Arguments as `EagerEngine`.

    On CUDA the update is the operator `solver_step` with its own noise. On the CPU, and with another noise than Philox,
    it is the operator's reference. `form` is what to run instead of the network's own inference form.
    """

    def __init__(
        self, model: nn.Module, timesteps: int, table: StepTable, dtype: torch.dtype, form: Form | None = None
    ) -> None:
        self.form, self.table = inference_form(model, dtype) if form is None else form, table
        self.steps = table.timesteps.tolist()
        self.noisy = (table.coefficients[:, 6] != 0).tolist()
        self.memory = bool((table.coefficients[:, 5] != 0).any())
        self.times = table.timesteps.to(torch.float64) / timesteps

    def __call__(
        self,
        x: Tensor,
        samples: Tensor,
        context: Tensor | None,
        guidance: float,
        noise: Noise,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """x [n, ...] at t = timesteps[0] -> x at t = 0. A callback costs a second state in memory, x0."""
        conditions = self.conditions(x, context, guidance)
        by_kernel = x.is_cuda and x.dtype == torch.float32 and isinstance(noise, PhiloxNoise)
        prepare = self.in_kernel if by_kernel else self.in_reference
        advance = prepare(x, samples, guidance, noise, callback is not None or self.memory)
        for i, index in enumerate(torch.arange(len(self.steps), device=x.device).split(1)):
            m = self.network(x, conditions.at(index), conditions.rows)
            x, x0 = advance(i, index, x, *m.chunk(conditions.halves))
            if callback is not None:
                callback(i, x0)
        return x

    def conditions(self, x: Tensor, context: Tensor | None, guidance: float) -> Conditions:
        """Of a chunk x: guided if there is a context to guide towards and a weight that is not 1."""
        guided = guidance != 1.0 and context is not None
        return self.form.conditions(self.times.to(x.device), context, x.shape[0], guided)

    def network(self, x: Tensor, at: tuple[Tensor, ...], rows: tuple[Tensor, ...] | None) -> Tensor:
        """The network's output [k * n, ...]."""
        return self.form(x, at, rows)

    def in_kernel(self, x: Tensor, samples: Tensor, guidance: float, noise: PhiloxNoise, keeps_x0: bool) -> Advance:
        """The update by the operator, in place on a copy of x."""
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        own = x.clone(memory_format=layout)
        rows, x0 = self.table.rows(x.device), torch.zeros_like(own) if keeps_x0 else None
        seed, weight = (torch.full((), value, device=x.device) for value in (noise.seed, guidance))

        def advance(i: int, index: Tensor, _: Tensor, m: Tensor, uncond: Tensor | None = None) -> Advanced:
            return solver_step(own, m, rows, index, seed, samples, uncond, weight, x0, self.table.clip), x0

        return advance

    def in_reference(self, x: Tensor, samples: Tensor, guidance: float, noise: Noise, keeps_x0: bool) -> Advance:
        """The update by the operator's reference, with noise that is drawn before."""
        rows = [row.unbind() for row in self.table.rows(x.device, x.dtype)[:, :7]]
        draws = self._draws(noise, samples, tuple(x.shape[1:]))
        previous = torch.zeros_like(x) if self.memory else None

        def advance(i: int, index: Tensor, x: Tensor, m: Tensor, uncond: Tensor | None = None) -> Advanced:
            nonlocal previous
            m = m.to(x.dtype)
            if uncond is not None:
                m = guide(m, uncond.to(x.dtype), guidance)
            z = next(draws) if self.noisy[i] else None
            x, x0 = reference(x, m, rows[i], z, previous, self.table.clip)
            previous = x0 if self.memory else None
            return x, x0

        return advance

    def _draws(self, noise: Noise, samples: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The noise of the noisy steps; Philox for several steps at once, which is the same noise."""
        steps = [step for step, noisy in zip(self.steps, self.noisy, strict=True) if noisy]
        if not isinstance(noise, PhiloxNoise):
            yield from (noise(samples, step, philox.Stream.SAMPLING, shape) for step in steps)
            return
        ahead = max(1, AHEAD // (len(samples) * math.prod(shape)))
        for start in range(0, len(steps), ahead):
            yield from noise.of_steps(samples, steps[start : start + ahead], shape)
