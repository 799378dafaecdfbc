"""The native engine: the CPU's counterpart of a CUDA graph.

The form's calls of operators in C++, guidance and the solver's update among them, are recorded once as a program; its
threads then run all steps of a chunk without Python (see `kernels.native.program`).
"""

import logging
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from ddpm.engines.engine import Chunk, engine, only_counts
from ddpm.engines.replaying import ReplayingEngine, State
from ddpm.inference.form import NATIVE, Rows
from ddpm.interrupts import interrupts_wait
from kernels import native
from kernels.native.program import Recorder
from kernels.native.threads import single_threaded

logger = logging.getLogger("ddpm")


class Recorded(State):
    """The program of one step. What has a row for each step is read at its first one, which moves on with each pass."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        first = itemgetter(slice(0, 1))
        recorder = Recorder(self.table, self.guidance, *self.tables)
        with interrupts_wait(), recorder:  # a mode of PyTorch's dispatcher: an exception from outside ends the process
            self.step(first, first(self.table), first(self.guidance))
        self.program = recorder.program()

    def load(self, *given: Any) -> None:
        with single_threaded():
            super().load(*given)

    def replay(self, count: int, singly: bool) -> Iterator[int]:
        return self.program.run(count, singly)


@engine
class NativeEngine(ReplayingEngine):
    """CPUs with a C++ compiler, float32, Philox noise, of networks whose form is written in operators alone."""

    name = "native"
    state = Recorded
    layout = NATIVE
    in_operators = True

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        if device.type != "cpu":
            return f"a CPU, the model is on {device}"
        if dtype != torch.float32:
            return "float32, which its operators compute in"
        if custom_noise:
            return "Philox noise, which its operators draw"
        lack = super().lacks(device, dtype, custom_noise)
        if lack is None and (missing := native.missing_any()) is not None:
            return f"its kernels: {missing}"
        return lack

    def rows(self, chunk: Chunk) -> Rows:
        with single_threaded():
            return super().rows(chunk)

    def run(self, chunk: Chunk) -> torch.Tensor:
        if chunk.callback is not None and not only_counts(chunk.callback):
            logger.info("engine native: goes row by row, for a callback")
        return super().run(chunk)
