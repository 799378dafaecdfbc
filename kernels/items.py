"""How kernels that draw noise deal the elements of [n, ...] out to threads, whatever the memory layout.

BLOCK, LANES, REPEAT, RUN and LAYOUT are constants of the compilation, here and in every kernel over items.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.backend import WARP, is_channels_last, jit, launch, tl

ITEMS_LIMIT = (1 << 31) - (1 << 16)  # the last program's item numbers still fit int32
VECTOR_BYTES = 16
WORDS = 4
SECTOR_LANES = 8  # neighbours that a chunk should have at least; untuned
INTERLEAVED_CHANNELS = 4  # whose normals a thread holds at once: 32 of them in bf16
PADDED_RUNS = 1 << 28
# Which integers of a launch change with the batch, or say nothing that the constants do not: a batch never met compiles
# no new kernel for them. Pointers stay specialised, and numel, on which the vectors of gathered rows depend.
COUNTS = ("total", "per_row", "magic", "shift")
NUM_WARPS = 4  # untuned
# Elements of one row per thread. Instructions per element of q_sample (bf16) and solver_step (fp32, with noise) for
# 3x16x16 on sm_90, triton 3.7.1, counted by `ddpm-bench static`; the bare kernels have 31.6 and 31.5:
#   39.2 and 39.8   16 elements (32 and 40 registers)
#   37.2 and 37.8   24 elements (48 registers: fewer warps per SM, and longer to compile)
# q_sample fp32 on 3x16x16 channels_last: 76.4 with elements C apart, 41.8 interleaved; on 1x5x7: 85.8 with one run per
# thread, 63.5 with three.
ITEM_ELEMENTS = 16


@dataclass(frozen=True)
class Items:
    """How [n, numel] elements are dealt out to threads.

    A run is `run` neighbours, the normals of whole Philox calls. An item, the work of one thread, is `repeat` runs, so
    that what a thread needs of its row (t, sample index) is found once per item:

    - layout "even", contiguous rows of whole runs: runs that are `lanes` runs apart, so that the threads of a warp
      touch neighbours, each run one vector access. `lanes` items make a chunk, `per_row` chunks a sample; chunks fill
      rows without a rest, so they follow each other in memory too.
    - "ragged", a last run that is cut short: the same, with masks and without vectors.
    - "interleaved", channels_last with few channels: the same `run` pixels of every channel. They are one piece of
      memory, `repeat` = C vectors, into which the thread weaves the channels' normals (see philox.tl_item_normals).
    - "strided", channels_last otherwise: like ragged, each element found by a division.

    The kernel finds the row of chunk q as q * magic >> shift, see `division`.
    """

    run: int
    lanes: int
    repeat: int
    per_row: int
    total: int
    layout: str
    magic: int
    shift: int
    shape: tuple[int, int, int]  # elements per sample, H*W and C; the last two matter for channels_last only

    @classmethod
    def of(cls, images: Tensor, *stored: Tensor | None, n: int | None = None) -> "Items":
        """Of n samples like `images` [.., ...] (n None: of all of them), which are `backend.packed`.

        stored: the tensors that are written, see `vector_run`.
        """
        n = images.shape[0] if n is None else n
        numel, area, channels = math.prod(images.shape[1:]), 1, 1
        if is_channels_last(images):
            area, channels = images.shape[2] * images.shape[3], images.shape[1]
        if numel >= 1 << 31:
            raise ValueError(f"got samples of {numel} elements, needs fewer than 2^31 each")
        run = vector_run(*stored)
        run = run if numel % run == 0 else WORDS  # fewer are taken if they do not divide numel
        if channels == 1:
            layout = "even" if numel % run == 0 else "ragged"
        else:
            layout = "interleaved" if channels <= INTERLEAVED_CHANNELS and area % run == 0 else "strided"
        interleaved = layout == "interleaved"
        runs = -(-(area if interleaved else numel) // run)
        step, lanes = _chunks(runs, 1 if interleaved else ITEM_ELEMENTS // run, whole=numel % run == 0)
        per_row = -(-runs // (lanes * step))
        total = n * per_row * lanes
        repeat = channels if interleaved else step
        if total >= ITEMS_LIMIT:
            raise ValueError(f"got {n} samples of {numel} elements, needs fewer than 2^31 items of {run * repeat}")
        return cls(run, lanes, repeat, per_row, total, layout, *division(per_row), (numel, area, channels))

    @property
    def programs(self) -> int:
        """How many programs `launch_items` starts."""
        return -(-self.total // (NUM_WARPS * WARP))


def division(by: int) -> tuple[int, int]:
    """(magic, shift) such that q // by == q * magic >> shift for 0 <= q < 2^31, with magic < 2^32.

    (Granlund & Montgomery 1994, theorem 4.2 with N = 31.)
    """
    bits = math.ceil(math.log2(by)) if by > 1 else 0
    return -(-(1 << (31 + bits)) // max(by, 1)), 31 + bits


def _chunks(runs: int, most: int, whole: bool) -> tuple[int, int]:
    """(runs per thread, threads per chunk). Where the last run is masked anyway, up to an eighth may be left over."""
    if whole:
        step = math.gcd(runs, most)
        rest = runs // step
        lanes = math.gcd(rest, WARP)
        # Threads that are not neighbours share no sector: 28x28 has 49 = 7 * 7 chunks of four runs.
        few = lanes < SECTOR_LANES
        return step, max(lane for lane in range(1, WARP + 1) if rest % lane == 0) if few and rest else lanes
    if runs > PADDED_RUNS:  # so that element numbers of the padding fit int32 too
        return 1, 1
    chunks = [(step, lanes) for step in range(1, most + 1) for lanes in range(1, WARP + 1)]
    return max((s, n) for s, n in chunks if -(-runs // (s * n)) * s * n * 8 <= runs * 9)


def vector_run(*stored: Tensor | None) -> int:
    """Neighbours that make a 16-byte store of the widest type that is stored: 4 or 8, whole Philox calls.

    Narrower inputs (uint8) are read with as many elements: reading 16 bytes of them would hand a thread more
    neighbours than one store takes, and the exchange through shared memory costs more than it saves
    (uint8 -> float32 on sm_90: 49.7 instructions per element so, 41.9 with 4-byte loads).
    """
    widest = max(tensor.element_size() for tensor in stored if tensor is not None)
    return min(max(WORDS, VECTOR_BYTES // widest), 2 * WORDS)


@jit
def place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT):
    """Of this program's items [BLOCK]: (which exist, row, first run within the row, first run of all, int64)."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, lane = q // LANES, q % LANES
    row = ((chunk.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint32)) >> shift).to(tl.uint32)
    RUNS: tl.constexpr = LANES if LAYOUT == "interleaved" else LANES * REPEAT
    first = (chunk - row.to(tl.int32) * per_row) * RUNS + lane
    return q < total, row, first, chunk.to(tl.int64) * RUNS + lane


@jit
def within(spot, j, shape, LANES, REPEAT, RUN, LAYOUT):
    """Of the j-th vectors of the items at `spot` = place(...): (places in their row's memory, mask), both [B, RUN].

    shape: (numel, H*W, C).
    """
    live, _, first, _ = spot
    numel, HW, C = shape
    lane = tl.arange(0, RUN)[None, :]
    mask = live[:, None]
    if LAYOUT == "interleaved":
        offsets = first[:, None] * (RUN * REPEAT) + (j * RUN + lane)
    else:
        element = (first + j * LANES)[:, None] * RUN + lane
        offsets = element
        if LAYOUT != "even":
            mask = mask & (element < numel)
        if LAYOUT == "strided":
            offsets = (element % HW) * C + element // HW
    return offsets, mask


@jit
def access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT):
    """(offsets int64 [B, RUN] from the tensor's start, mask) of the same vectors."""
    offsets, mask = within(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
    if LAYOUT == "even":
        offsets = (spot[3] + j * LANES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    else:
        offsets = spot[1].to(tl.int64)[:, None] * shape[0] + offsets
    return offsets, mask


def launch_items(kernel: Any, items: Items, *tensors: Any, more: tuple = (), **constants: Any) -> None:
    """Launch a kernel over items; its arguments are (*tensors, total, per_row, magic, shift, numel, HW, C, *more)."""
    numbers = (items.total, items.per_row, items.magic, items.shift, *items.shape, *more)
    constants |= {"BLOCK": NUM_WARPS * WARP, "LANES": items.lanes, "REPEAT": items.repeat, "RUN": items.run}
    launch(kernel, (items.programs,), *tensors, *numbers, num_warps=NUM_WARPS, LAYOUT=items.layout, **constants)
