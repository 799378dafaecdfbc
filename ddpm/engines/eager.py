"""The eager engine: module, table, plain torch operators. It is the specification of the others."""

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Chunk, Engine, FormOf, engine, guided, guides, shaped
from ddpm.inference.form import checked, typed
from ddpm.networks.protocol import in_type, null_condition, predict
from kernels import philox
from kernels.solver_step import reference


@engine
class EagerEngine(Engine):
    """Runs the table row by row, the network as it is; guidance calls it on twice the rows."""

    name = "eager"
    live = True

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        self.refresh(model)
        times = in_type(self.times, self.dtype)
        self.time_of_row, self.kind = times.tolist(), times.dtype

    def refresh(self, model: nn.Module) -> None:
        """A copy in another type is made anew."""
        self.model = typed(model, self.dtype)

    def run(self, chunk: Chunk) -> Tensor:
        x, context = chunk.x, chunk.context
        rows = self.table.rows(x.device, x.dtype)
        steps, weights = self.table.noise_steps.tolist(), self.table.weights_of_guidance(chunk.guidance)
        acts = [guides(weight) for weight in weights]
        null = chunk.negative
        if null is None and context is not None and any(acts):
            null = null_condition(self.model, context)
        x0 = torch.zeros_like(x)
        for i, (step, time) in enumerate(zip(steps, self.time_of_row, strict=True)):
            how = (null, shaped(weights[i], x), chunk.rescale) if acts[i] and null is not None else ()
            m = self._output(x, time, context, how, *((x0,) if self.recalls else ()))
            z = chunk.noise(chunk.samples, step, philox.Stream.SAMPLING, tuple(x.shape[1:])) if self.noisy[i] else None
            x, x0 = reference(x, m, rows[i, :7].unbind(), z, x0, self.table.clip)
            if chunk.callback is not None:
                chunk.callback(i, x0)
        return x

    def _output(
        self,
        x: Tensor,
        time: float,
        context: Tensor | None,
        how: tuple[Tensor, float | Tensor, float | None] | tuple[()],
        *recalled: Tensor,
    ) -> Tensor:
        """The network's output. how: guided by (conditions of the other half, weights, rescale), or () not at all.

        Both halves of guidance are one call of [2n, ...] rows, so a single guided sample is a batch of two: PyTorch
        convolves a batch of one on the CPU by another algorithm, whose rounding (6.4e-7 against 1.8e-7) guidance would
        blow up to 1.8e-5 over a trajectory, measured on the sprites run with guidance 2.
        """
        if not how:
            return self._network(x, time, context, *recalled)
        null, *by = how
        twice = (torch.cat((each, each)) for each in recalled)
        both = self._network(torch.cat((x, x)), time, torch.cat((context, null)), *twice)
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, *by)

    def _network(self, x: Tensor, time: float, context: Tensor | None, *recalled: Tensor) -> Tensor:
        t = torch.full((x.shape[0],), time, dtype=self.kind, device=x.device)
        c = None if context is None else context.to(self.dtype)
        recalled = (each.to(self.dtype) for each in recalled)
        return checked(predict(self.model, x.to(self.dtype), t, c, *recalled), x).to(x.dtype)
