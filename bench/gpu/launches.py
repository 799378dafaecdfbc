"""`python -m bench.gpu.launches`: every operator once, on CUDA; what compute-sanitizer and ncu run.

    no argument: all launches;  K/N: the K-th of N shares of them;  planted: one that a memory checker must object to;
    ELEMENTS: the workloads alone, at this size

The launches are those of `bench.kernels.workloads` in three types, and the cases of the static report, which have the
strided, ragged and channels_last shapes: an operator that is in either list is covered.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch

from bench.kernels import workloads
from bench.static.cases import CASES
from bench.suites.cuda import TYPES
from bench.timing import synchronize
from kernels import backend
from kernels.backend import jit, tl

TINY = 3 * 16 * 16 * 5  # elements: five images
PLANTED = "planted"
BEYOND = 8


@jit
def planted_kernel(x, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803 (as in kernels/)
    """Writes BEYOND elements past the end of x, for memcheck to find."""
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def launches(device: torch.device, which: str = "") -> Iterator[tuple[str, Callable]]:
    """(name, call) of every launch that the argument names; a workload's tensors are made before it is yielded."""
    if which == PLANTED:
        x = torch.zeros(32 - BEYOND, device=device)
        yield PLANTED, partial(backend.launch, planted_kernel, (1,), x, BLOCK=32, num_warps=1)
        return
    elements = int(which) if which.isdecimal() else TINY
    for label, dtype in TYPES.items():
        for workload in workloads(elements, dtype, device, data_rows=1):
            yield f"{workload.name} {label}", partial(workload.fused, *workload.make(0))
    if not which.isdecimal():
        for name, case in CASES.items():
            yield f"case {name}", case.run


def main(which: str, device: torch.device) -> None:
    """Launch, each finished before the next; says how many. Profilers that wait for it see the calls alone."""
    first, step = map(int, which.split("/")) if "/" in which else (0, 1)
    count = 0
    for name, call in islice(launches(device, which), first, None, step):
        print(name, flush=True)
        synchronize(device)
        with torch.device(device), torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
            call()
            synchronize(device)
        count += 1
    print(f"launched {count}")


if __name__ == "__main__":
    main("".join(sys.argv[1:]), torch.device("cuda"))
