"""Suite `kernels`: every operator against the eager sequence that it replaces, see `bench.kernels`.

On the CPU an operator runs in C++ where there is a compiler, else it is its PyTorch reference, which computes Philox in
torch operators. `noise_mse` draws noise that its eager sequence reads: its ratio there is below 1. A convolution's
reference is the library's, its eager sequence: there is nothing to compare without a GPU. `winograd` is for CPUs alone.
"""

from functools import partial

import torch

from bench import kernels
from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import TYPES


def bench_of(found: kernels.Workload, device: torch.device) -> Bench:
    """An operator beside its eager sequence."""
    sets = [found.make(k) for k in range(kernels.sets_for(found, device))]
    # bench.kernels judges the operator itself, which is what `make` returns.
    operator = Candidate(lambda: found.fused, lambda _: found.error(sets[0]), kernels.TOLERANCE[found.dtype])
    return Bench(sets, found.eager, {"operator": operator}, found.cost, frozen=True, capturable=True)


def _build(name: str, elements: int, dtype: torch.dtype, device: torch.device) -> Bench:
    return bench_of(next(w for w in kernels.workloads(elements, dtype, device) if w.name == name), device)


def workloads(quick: bool) -> list[Workload]:
    """Every operator of `bench.kernels` by size and type. Its names come from a tiny instance on the CPU."""
    elsewhere = {kernels.WINOGRAD} if torch.cuda.is_available() else kernels.CONVOLUTIONS
    return [
        Workload(f"kernels/{w.name}/{label}/1e{exponent}", "kernels", partial(_build, w.name, 10**exponent, w.dtype))
        for label in (("fp32",) if quick else TYPES)
        for w in kernels.workloads(1, TYPES[label], torch.device("cpu"))
        if w.name not in elsewhere
        for exponent in ((5,) if quick else (5, 6))
    ]
