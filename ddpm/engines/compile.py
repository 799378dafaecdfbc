"""The compile engine: the fused engine with its network, and on the CPU its noise and update, through torch.compile.

What changes from step to step enters as tensors and the batch is dynamic, so one graph serves all steps and seeds, and
few serve all batches: one sample, more, and others where Inductor treats sizes apart (at 16 or 32 samples, say).
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.engines.engine import Chunk, FormOf, engine, guided, shaped
from ddpm.engines.fused import FusedEngine, Update
from ddpm.inference.form import Rows
from ddpm.interrupts import interrupts_wait
from ddpm.noise import PhiloxNoise
from kernels import philox
from kernels.solver_step import reference

logger = logging.getLogger("ddpm")

# Graphs per function in one process, an error beyond: each network, type, solver with or without noise, memory of x0,
# clip and guidance has its own, and PyTorch's eight are soon used up.
RECOMPILE_LIMIT = 256


def compiler_missing() -> str | None:
    """The C++ compiler that torch.compile and AOTInductor lack here, or None: they take CXX, else g++, and no other."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"a C++ compiler, found no {compiler!r} (install g++ or set CXX)"


def _update(
    x: Tensor,
    m: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    rescale: Tensor | None,
    row: Tensor,
    previous: Tensor | None,
    clip: float | None,
    seed: Tensor,
    samples: Tensor,
    noisy: bool,
) -> tuple[Tensor, Tensor]:
    """One row of the table (seven coefficients and t) with its Philox noise."""
    m = m.to(x.dtype)
    if uncond is not None:
        m = guided(m, uncond.to(x.dtype), guidance, rescale)
    z = None
    if noisy:
        step, shape = row[7].to(torch.int64), tuple(x.shape[1:])
        z = philox.normal(seed, samples, step, philox.Stream.SAMPLING, shape, device=x.device, dtype=x.dtype)
    return reference(x, m, row[:7].unbind(), z, previous, clip)


@cache
def _compiled_update() -> Callable[..., tuple[Tensor, Tensor]]:
    """Made at first use: torch.compile loads its compiler, 2.7 s of an import of 5."""
    return torch.compile(_update, fullgraph=True)


def batch_may_vary(*tensors: Tensor | None, dim: int = 0) -> None:
    """Tell torch.compile that a dimension changes between calls."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _guards_of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Not of modules, globals and weights, which a form never exchanges: 500 of 540 guards, 0.1 ms of a step of 4."""
    return [not guard.name.startswith(("self", "L['self']", "G[")) for guard in guards]


@engine
class CompileEngine(FusedEngine):
    """A network's first call compiles it (tens of seconds) and logs how long that took."""

    name = "compile"
    first = True

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        super().prepare(model, form)
        # Kept with the form, as its weights are. A function, not a module: it must not become a submodule.
        if not hasattr(self.form, "compiled"):
            options = None if self.form.live else {"guard_filter_fn": _guards_of_arguments}
            self.form.compiled = torch.compile(self.form.forward, fullgraph=True, options=options)
            # Shapes that the network and the update were called with: others may have to be compiled. Holding signals
            # takes 100 us, a fifth of a step of a small network.
            self.form.met = set()

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        return super().lacks(device, dtype, custom_noise) or (compiler_missing() if device.type == "cpu" else None)

    def network(self, x: Tensor, table_row: tuple[Tensor, ...], rows: Rows, *recalled: Tensor) -> Tensor:
        batch_may_vary(x, *recalled)
        batch_may_vary(*(rows or ()), dim=1)
        if not self.first:
            return self.form.compiled(x, table_row, rows, *recalled)
        self.first, key = False, ("network", x.shape, *(row.shape for row in rows or ()))
        return self._called(key, self.form.compiled, x, table_row, rows, *recalled)

    def _called(self, key: tuple[object, ...], call: Callable[..., Any], *arguments: Any) -> Any:
        """A compiled function's result; interrupts wait where nothing was called with this key, so may be compiled."""
        if key in self.form.met:
            return call(*arguments)
        with interrupts_wait():
            result = call(*arguments)
        self.form.met.add(key)
        return result

    def run(self, chunk: Chunk) -> Tensor:
        before, began = _seconds_compiling(), time.perf_counter()
        self.first = True
        # Batches may vary, which is marked. Another network's sizes must not make this one's dynamic, as they do else:
        # Inductor 2.13 fails to lower a SimpleUNet then.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, automatic_dynamic_shapes=False):
            x = super().run(chunk)
        compiling = _seconds_compiling() - before
        if compiling > 0:
            logger.info("engine compile: %.1f s of %.1f s were compiling", compiling, time.perf_counter() - began)
        return x

    def update(self, chunk: Chunk) -> Update:
        """The update, compiled with its noise; with another noise than Philox as in the fused engine."""
        if not isinstance(chunk.noise, PhiloxNoise):
            return super().update(chunk)
        x, samples = chunk.x, chunk.samples
        rows = self.table.rows(x.device, x.dtype).unbind()
        seed = torch.full((), chunk.noise.seed, device=x.device)
        weights = [weight if weight.ndim == 0 else shaped(weight, x) for weight in self.weights(chunk).unbind()]
        rescale = None if chunk.rescale is None else torch.full((), chunk.rescale, dtype=x.dtype, device=x.device)
        kind = x.shape, self.table.clip, rescale is None

        def update(i: int, x: Tensor, m: Tensor, uncond: Tensor | None, previous: Tensor | None) -> tuple[Tensor, ...]:
            batch_may_vary(x, m, uncond, previous, samples, weights[i] if weights[i].ndim else None)
            more = weights[i], rescale, rows[i], previous, self.table.clip, seed, samples, self.noisy[i]
            key = *kind, uncond is None, previous is None, self.noisy[i], weights[i].ndim
            return self._called(key, _compiled_update(), x, m, uncond, *more)

        return update


def _seconds_compiling() -> float:
    return sum(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", ()))
