"""What every Triton kernel here shares: the import of Triton, where kernels may run, how elements are dealt out.

Triton is optional: without it the operators run their references on CPU tensors and refuse CUDA tensors.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    jit = triton.jit
except ImportError:
    triton = libdevice = None
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(function=None, do_not_specialize=()):
        return function or (lambda decorated: decorated)


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"
# Reads values on CUDA too, which costs a synchronisation per call.
DEBUG = os.environ.get("FUSED_DDPM_DEBUG", "0") == "1"

ITEMS_LIMIT = (1 << 31) - (1 << 16)  # the last program's item numbers still fit int32
VECTOR_BYTES = 16
WORDS = 4
WARP = 32
SECTOR_LANES = 8  # neighbours that a chunk should have at least; untuned
INTERLEAVED_CHANNELS = 4  # whose normals a thread holds at once: 32 of them in bf16
PADDED_RUNS = 1 << 28
# Which integers of a launch change with the batch, or say nothing that the constants do not: a batch never met compiles
# no new kernel for them. Pointers stay specialised, and numel, on which the vectors of gathered rows depend.
COUNTS = ("total", "per_row", "magic", "shift")


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor launch Triton: on CUDA, and on the CPU under TRITON_INTERPRET=1."""
    if tensor.is_cuda and triton is None:
        raise RuntimeError("CUDA tensors need Triton, which is not installed (pip install triton)")
    return tensor.is_cuda or INTERPRETED or _recorder.launches is not None


def is_opaque(tensor: Tensor) -> bool:
    """Whether an operator of the network's inference form is called as the registered operator: where Triton runs.

    Elsewhere it is its reference inline: Inductor fuses that, and a call is spared the wrapper of
    torch.library.custom_op (25 to 120 us, EPYC with AVX2). Under torch.export it always is: exporters see plain
    operators.
    """
    return not torch.compiler.is_exporting() and runs_triton(tensor)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that references compute in: float32, or float64 for it. torch.promote_types leaves a node in exports."""
    return dtype if dtype == torch.float64 else torch.float32


def reads_values(tensor: Tensor) -> bool:
    """Whether argument values are checked: always on the CPU, on CUDA only under FUSED_DDPM_DEBUG=1."""
    if tensor.device.type == "cpu":
        return True
    return DEBUG and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def same_device(first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors live where the first does."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: is on {other.device}, needs {first.device} like the first argument")


def scalar(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar tensor on the device, made there without a copy from the host.

    Raises ValueError for a tensor elsewhere (copying it would stop the device) or of more than one element.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.device != device or value.numel() != 1:
        raise ValueError(
            f"{name}: got {value.numel()} elements on {value.device}, needs one on {device} like the first argument"
        )
    return value.reshape(()).to(dtype)


def vector(tensor: Tensor | None) -> Tensor | None:
    """A per-row argument as kernels index it: without strides, integers as int64."""
    if tensor is None:
        return None
    return (tensor if tensor.is_floating_point() else tensor.to(torch.int64)).contiguous()


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

    @classmethod
    def of(cls, n: int, shape: tuple[int, int, int], run: int) -> "Items":
        """shape: (numel, H*W, C) of `geometry`; run: neighbours that are wanted together, see `vector_run`."""
        numel, area, channels = shape
        if numel >= 1 << 31:
            raise ValueError(f"got samples of {numel} elements, needs fewer than 2^31 each")
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
            raise ValueError(
                f"got {n} samples of {numel} elements, needs fewer than 2^31 items of {run * repeat} elements"
            )
        return cls(run, lanes, repeat, per_row, total, layout, *division(per_row))


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
def place(
    total,
    per_row,
    magic,
    shift,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Of this program's items [BLOCK]: (which exist, row, first run within the row, first run of all, int64)."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, lane = q // LANES, q % LANES
    row = ((chunk.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint32)) >> shift).to(tl.uint32)
    RUNS: tl.constexpr = LANES if LAYOUT == "interleaved" else LANES * REPEAT
    first = (chunk - row.to(tl.int32) * per_row) * RUNS + lane
    return q < total, row, first, chunk.to(tl.int64) * RUNS + lane


@jit
def within(spot, j, shape, LANES: tl.constexpr, REPEAT: tl.constexpr, RUN: tl.constexpr, LAYOUT: tl.constexpr):
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
def access(spot, j, shape, LANES: tl.constexpr, REPEAT: tl.constexpr, RUN: tl.constexpr, LAYOUT: tl.constexpr):
    """(offsets int64 [B, RUN] from the tensor's start, mask) of the same vectors."""
    offsets, mask = within(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
    if LAYOUT == "even":
        offsets = (spot[3] + j * LANES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    else:
        offsets = spot[1].to(tl.int64)[:, None] * shape[0] + offsets
    return offsets, mask


def layout_of(tensor: Tensor) -> tuple[Tensor, bool]:
    """(tensor, is channels_last): other strides are copied to the contiguous layout."""
    if tensor.is_contiguous():
        return tensor, False
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor, True
    return tensor.contiguous(), False


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in the memory layout of `other`."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def geometry(tensor: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """(elements per sample, H*W, C); the last two matter for channels_last only."""
    numel = tensor[0].numel() if tensor.shape[0] else math.prod(tensor.shape[1:])
    return (numel, tensor.shape[2] * tensor.shape[3], tensor.shape[1]) if channels_last else (numel, 1, 1)


@dataclass(frozen=True)
class Launch:
    """One launch: what `static` compiles for cards that are not here."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass
class _Recorder:
    launches: list[Launch] | None = field(default=None)


_recorder = _Recorder()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches instead of executing them: outputs stay uninitialised."""
    _recorder.launches = launches = []
    try:
        yield launches
    finally:
        _recorder.launches = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Run a Triton kernel on the device of its tensors; nothing for an empty grid."""
    if 0 in grid:
        return
    if _recorder.launches is not None:
        _recorder.launches.append(Launch(kernel, grid, args, constants, {"num_warps": num_warps}))
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **constants, num_warps=num_warps)
    else:
        kernel[grid](*args, **constants)


NUM_WARPS = 4  # untuned
# Elements of one row per thread. Instructions per element of q_sample (bf16) and solver_step (fp32, with noise) for
# 3x16x16 on sm_90, triton 3.7.1, counted by `ddpm-bench static`; the bare kernels have 31.6 and 31.5:
#   45.7 and 45.7   before: a row looked up for every 8 or 4 elements, an exchange through shared memory in bf16,
#                   solver_step not multiplied out, Philox unrolled by Triton
#   39.2 and 39.8   16 elements (32 and 40 registers)
#   37.2 and 37.8   24 elements (48 registers: fewer warps per SM, and longer to compile)
# q_sample fp32 on 3x16x16 channels_last: 76.4 with elements C apart, 41.8 interleaved; on 1x5x7: 85.8 with one run per
# thread, 63.5 with three.
ITEM_ELEMENTS = 16


def launch_items(
    kernel: Any, items: Items, tensors: tuple[Any, ...], shape: tuple[int, int, int], *more: Any, **constants: Any
) -> None:
    """Launch a kernel over items; its arguments are (*tensors, total, per_row, magic, shift, numel, HW, C, *more)."""
    launch(
        kernel,
        (programs(items),),
        *tensors,
        items.total,
        items.per_row,
        items.magic,
        items.shift,
        *shape,
        *more,
        BLOCK=NUM_WARPS * WARP,
        LANES=items.lanes,
        REPEAT=items.repeat,
        RUN=items.run,
        LAYOUT=items.layout,
        num_warps=NUM_WARPS,
        **constants,
    )


def programs(items: Items) -> int:
    """How many programs `launch_items` starts."""
    return -(-items.total // (NUM_WARPS * WARP))


@dataclass(frozen=True)
class Cost:
    """What an operator moves and computes per element: bytes of memory traffic, floating-point operations."""

    bytes: float
    flops: float
