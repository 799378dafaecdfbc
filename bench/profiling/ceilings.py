"""What this machine can do at best, measured in the same run: copies, matrix products, convolutions."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from bench.measure import convolution_ceiling
from ddpm.progress import Bar

ROUNDS = 8
ROUND_SECONDS = 0.02  # of a case, or one call where that is longer
# Working sets of a copy that stays in a cache (an H200's L2 holds 60 MB, a server CPU's L3 32 MB), and of one that
# cannot.
CACHED_BYTES, LARGE_BYTES = 4 * 2**20, {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX_SIDES = {"cpu": (768, 1536), "cuda": (4096, 8192)}


def measure(device: torch.device, dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, Any]:
    """Best rates of the device: bytes/s of a copy (read + written), flop/s of a matrix product and a convolution.

    Returns: {"copy_gb_per_s", "cached_copy_gb_per_s", "matmul_gflop_per_s", "conv_gflop_per_s"} and the sizes that
    won, in dtype but for the convolution, which is that of `bench.measure`; the best of `rounds`, because everything
    that disturbs only makes slower.
    """
    cases: list[tuple[str, str, float, Callable[[], Any]]] = []
    for name, size in (("copy_gb_per_s", LARGE_BYTES[device.type]), ("cached_copy_gb_per_s", CACHED_BYTES)):
        source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        cases.append((name, f"{size // 2**20} MiB", size, lambda s=source, t=target: t.copy_(s)))
    generator = torch.Generator(device).manual_seed(0)
    for side in MATRIX_SIDES[device.type]:
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        cases.append(("matmul_gflop_per_s", f"{side}x{side}", 2 * side**3, lambda a=a, b=b: a @ b))
    best: dict[str, Any] = {}
    with Bar("ceilings", len(cases) + 1, "cases/s") as bar, torch.no_grad():
        for done, (name, what, amount, call) in enumerate(cases, start=1):
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            calls = timer.blocked_autorange(min_run_time=ROUND_SECONDS).number_per_run
            rate = amount / min(timer.timeit(calls).median for _ in range(rounds)) / 1e9
            if rate > best.get(name, 0.0):
                best |= {name: round(rate, 2), f"{name.split('_g')[0]}_at": what}
            bar.update(done)
        convolution = convolution_ceiling(device, rounds)
        best |= {"conv_gflop_per_s": round(convolution.flops_per_s / 1e9, 2), "conv_at": convolution.at}
        bar.update(len(cases) + 1)
    return best
