"""`python -m bench.gpu.launches`: every operator once, on CUDA; what compute-sanitizer and ncu run.

All of `bench.kernels.workloads` in three types, and the cases of the static report, which have the strided, ragged and
channels_last shapes: an operator that is in either list is covered.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch

from bench.gpu.kernels import LABELS, TYPES
from bench.kernels import workloads
from bench.static.cases import CASES
from bench.timing import synchronize
from kernels import backend
from kernels.backend import jit, tl

TINY = 3 * 16 * 16 * 5  # elements: five images
BEYOND = 8


@jit
def planted_kernel(x, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803 (as in kernels/)
    """Writes BEYOND elements past the end of x, for memcheck to find."""
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def planted(device: torch.device) -> None:
    """The launch that a memory checker must object to."""
    x = torch.zeros(32 - BEYOND, device=device)
    backend.launch(planted_kernel, (1,), x, BLOCK=32, num_warps=1)


def launches(device: torch.device, elements: int = TINY, cases: bool = True) -> Iterator[tuple[str, Callable]]:
    """(name, call) of every launch; the arguments of the workloads are made before they are yielded."""
    for dtype in TYPES:
        for workload in workloads(elements, dtype, device, data_rows=1):
            yield f"{workload.name} {LABELS[dtype]}", partial(workload.fused, *workload.make(0))
    if cases:
        for name, case in CASES.items():
            yield f"case {name}", case.run


def launch_all(device: torch.device, elements: int = TINY, cases: bool = True, shard: tuple[int, int] = (0, 1)) -> int:
    """Run them, each finished before the next; says how many. Profilers that wait for it see the calls alone.

    shard: (k, n) for the k-th of n parts.
    """
    first, step = shard
    count = 0
    for name, call in islice(launches(device, elements, cases), first, None, step):
        print(name, flush=True)
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        with torch.device(device):
            call()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        count += 1
    print(f"launched {count}")
    return count


def main(arguments: Sequence[str], device: torch.device) -> None:
    """No arguments: all launches. planted; shard K N; or ELEMENTS, the workloads alone at this size."""
    match arguments:
        case []:
            launch_all(device)
        case ["planted"]:
            planted(device)
            synchronize(device)
        case ["shard", k, n]:
            launch_all(device, shard=(int(k), int(n)))
        case [elements]:
            launch_all(device, int(elements), cases=False)


if __name__ == "__main__":
    main(sys.argv[1:], torch.device("cuda"))
