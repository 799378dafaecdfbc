"""The native engine: the CPU's counterpart of a CUDA graph.

The form's calls of operators in C++, guidance and the solver's update among them, are recorded once as a program; its
threads then run all steps of a chunk without Python (see `kernels.native.program`).
"""

import copy
import logging
import math
import os
from collections.abc import Iterator
from itertools import pairwise
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


# Of the images that go through the network together: 8 of 16x16, whose features the second cache holds (two cores of a
# Zen 4 with 1 MiB each: 32 together take 1 to 7% longer, 64 14%).
PIXELS = 2048


class Recorded(State):
    """The program of one step. What has a row for each step is read at its first one, which moves on with each pass."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        count = math.ceil(self.x[:, 0].numel() / PIXELS)
        bounds = [len(self.x) * k // count for k in range(count + 1)]
        self.parts = [self._part(slice(*pair)) for pair in pairwise(bounds) if pair[0] < pair[1]]
        first = itemgetter(slice(0, 1))
        recorder = Recorder(self.table, self.guidance, *self.tables)
        with interrupts_wait(), recorder:  # a mode of PyTorch's dispatcher: an exception from outside ends the process
            for _, part in self.parts:
                part.step(first, first(self.table), first(part.guidance))
        self.program = recorder.program()

    def _part(self, own: slice) -> tuple[slice, State]:
        """The state of some of the samples: their parts of its buffers, but rows, which are wanted contiguous."""
        part = copy.copy(self)
        part.x, part.samples = self.x[own], self.samples[own]
        part.guidance = self.guidance[:, own] if self.guidance.ndim > 1 else self.guidance
        part.x0 = None if self.x0 is None else self.x0[own]
        part.recalled = tuple(tensor[own] for tensor in self.recalled)
        part.rows = None if self.rows is None else tuple(row[:, own].contiguous() for row in self.rows)
        return own, part

    def load(self, *given: Any) -> None:
        with single_threaded():
            super().load(*given)
            for own, part in self.parts:
                for row, whole in zip(part.rows or (), self.rows or (), strict=True):
                    row.copy_(whole[:, own])

    def replay(self, count: int, singly: bool) -> Iterator[int]:
        # More than there are processors would wait for each other: with 8 on two a step takes three times as long.
        threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        return self.program.run(count, singly, threads)


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

    # PyTorch's embeddings too are the same bits whatever the number of threads, and wake none.
    def tables(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        with single_threaded():
            return super().tables(device)

    def rows(self, chunk: Chunk) -> Rows:
        with single_threaded():
            return super().rows(chunk)

    def run(self, chunk: Chunk) -> torch.Tensor:
        if chunk.callback is not None and not only_counts(chunk.callback):
            logger.info("engine native: goes row by row, for a callback")
        return super().run(chunk)
