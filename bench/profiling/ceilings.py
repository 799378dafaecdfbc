"""What this machine can do at best, measured in the same run: copies, matrix products, convolutions."""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import convolution_ceiling
from bench.timing import synchronize
from ddpm.progress import Bar

ROUNDS = 8
# Working sets of a copy that stays in a cache (an H200's L2 holds 60 MB, a server CPU's L3 32 MB), and of one that
# cannot.
CACHED_BYTES, LARGE_BYTES = 4 * 2**20, {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX_SIDES = {"cpu": (768, 1536), "cuda": (4096, 8192)}


def _best_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The shortest of several timings, each long enough (a millisecond at least) for the clock."""
    call()
    repeats = 1
    shortest = float("inf")
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        seconds = (time.perf_counter() - began) / repeats
        shortest = min(shortest, seconds)
        repeats = max(repeats, min(1000, int(1e-3 / seconds)))
    return shortest


def measure(device: torch.device, dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, Any]:
    """Best rates of the device: bytes/s of a copy (read + written), flop/s of a matrix product and a convolution.

    Returns: {"copy_gb_per_s", "cached_copy_gb_per_s", "matmul_gflop_per_s", "conv_gflop_per_s"} and the sizes that
    won, in dtype but for the convolution, which is that of `bench.measure`; the best of `rounds`, because everything
    that disturbs only makes slower.
    """
    kind = device.type
    cases: list[tuple[str, str, float, Callable[[], Any]]] = []
    for name, size in (("copy_gb_per_s", LARGE_BYTES[kind]), ("cached_copy_gb_per_s", CACHED_BYTES)):
        source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        cases.append((name, f"{size // 2**20} MiB", size, lambda s=source, t=target: t.copy_(s)))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    for side in MATRIX_SIDES[kind]:
        a, b = normal(side, side), normal(side, side)
        cases.append(("matmul_gflop_per_s", f"{side}x{side}", 2 * side**3, lambda a=a, b=b: a @ b))
    best: dict[str, Any] = {}
    with Bar("ceilings", len(cases) + 1, "cases/s") as bar, torch.no_grad():
        for done, (name, what, amount, call) in enumerate(cases, start=1):
            rate = amount / _best_seconds(call, device, rounds) / 1e9
            if rate > best.get(name, 0.0):
                best |= {name: round(rate, 2), f"{name.split('_g')[0]}_at": what}
            bar.update(done)
        convolution = convolution_ceiling(device, rounds)
        best |= {"conv_gflop_per_s": round(convolution.flops_per_s / 1e9, 2), "conv_at": convolution.at}
        bar.update(len(cases) + 1)
    return best
