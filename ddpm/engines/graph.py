"""The graph engine: several steps of the fused engine as one CUDA graph.

Step index, table, seed, sample indices and conditions live in device memory, and the graph itself advances the index,
so a replay needs nothing from the host.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ddpm.engines.engine import Chunk, engine
from ddpm.engines.replaying import ReplayingEngine, State

STEPS_PER_GRAPH = 10  # untuned
WARM_UP_STEPS = 3
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


class Capture(State):
    """The graphs of one and of STEPS_PER_GRAPH steps."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        device = self.x.device

        def first() -> None:
            self.index.zero_()  # a table may have fewer rows
            self._advance()

        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with _capturing:
            side = warm_up(device, first)
            pool = torch.cuda.graph_pool_handle()
            for steps in (1, STEPS_PER_GRAPH):
                self.graphs[steps] = graph = torch.cuda.CUDAGraph()
                # What other threads do meanwhile is no part of it, and no error.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    for _ in range(steps):
                        self._advance()

    def _advance(self) -> None:
        self.step(partial(torch.index_select, dim=0, index=self.index), self.table, self.guidance)
        self.index.add_(1)

    def replay(self, count: int, singly: bool) -> Iterator[int]:
        done = 0
        while done < count:
            some = STEPS_PER_GRAPH if not singly and count - done >= STEPS_PER_GRAPH else 1
            self.graphs[some].replay()
            done += some
            yield done


@engine
class GraphEngine(ReplayingEngine):
    """CUDA only, with Philox noise, which the kernel draws. A callback costs replays of single steps and a state."""

    name = "graph"
    state = Capture

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        if device.type != "cuda":
            return f"a CUDA device, the model is on {device}"
        if custom_noise or dtype == torch.float64:
            return "Philox noise and a state in float32, which its kernel draws and holds"
        return super().lacks(device, dtype, custom_noise)

    def run(self, chunk: Chunk) -> Tensor:
        with torch.cuda.device(chunk.x.device):
            return super().run(chunk)
