"""The yardstick: normals of the noise contract and a store, nothing else.

    out = eps,   eps ~ N(0, I) of one sample

No operator: the static report counts how many instructions the operators add to these.
"""

import torch
from torch import Tensor

from kernels import backend, philox
from kernels.backend import WARP, Cost, jit, tl
from kernels.items import ITEM_ELEMENTS, NUM_WARPS, vector_run
from kernels.philox import Stream, tl_normals


@jit
def bare_kernel(
    out,
    seed,
    sample,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    REPEAT: tl.constexpr,
    RUN: tl.constexpr,
):
    first = tl.program_id(0) * (BLOCK * REPEAT) + tl.arange(0, BLOCK)
    key, index = tl.load(seed), tl.load(sample)
    for j in tl.static_range(REPEAT):
        run = first + j * BLOCK
        z = tl_normals(key, tl.full((), 0, tl.int32), index, STREAM, run, RUN)
        offsets = run.to(tl.int64)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        tl.store(out + offsets, z.to(out.dtype.element_ty))


def launch(out: Tensor, seed: Tensor, sample: Tensor) -> None:
    """Fill `out`, one sample of whole programs (no masks); seed and sample: int64 scalars."""
    run, block = vector_run(out), NUM_WARPS * WARP
    grid, constants = (out.numel() // (block * ITEM_ELEMENTS),), {"BLOCK": block, "RUN": run, "num_warps": NUM_WARPS}
    stream, repeat = int(Stream.TRAINING_NOISE), ITEM_ELEMENTS // run
    backend.launch(bare_kernel, grid, out, seed, sample, STREAM=stream, REPEAT=repeat, **constants)


def cost(out: torch.dtype) -> Cost:
    """One store; the normal."""
    return Cost(bytes=out.itemsize, flops=philox.NORMAL_FLOPS)
