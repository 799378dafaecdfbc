"""Suite `kernels`: every operator against the eager sequence that it replaces, see `bench.kernels`.

On the CPU an operator is its PyTorch reference, so the ratio there says what the noise contract costs (torch.randn is
cheaper than Philox in torch operators), and a slower operator shows in its own row. A convolution's reference is the
library's, its eager sequence: there is nothing to compare without a GPU. `winograd` is for CPUs alone.
"""

from functools import partial
from math import log10

import torch

from bench import kernels
from bench.registry import Bench, Candidate, Workload

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = (10**5, 10**6)
QUICK_SIZES = (10**5,)


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
    types = {"fp32": torch.float32} if quick else TYPES
    names = {
        label: [w.name for w in kernels.workloads(1, dtype, torch.device("cpu"))] for label, dtype in types.items()
    }
    elsewhere = {kernels.WINOGRAD} if torch.cuda.is_available() else set(kernels.CONVOLUTIONS)
    return [
        Workload(f"kernels/{name}/{label}/1e{round(log10(size))}", "kernels", partial(_build, name, size, dtype))
        for label, dtype in types.items()
        for name in names[label]
        if name not in elsewhere
        for size in (QUICK_SIZES if quick else SIZES)
    ]
