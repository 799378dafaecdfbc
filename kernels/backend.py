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

    def jit(function):
        return function


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"
# Reads values on CUDA too, which costs a synchronisation per call.
DEBUG = os.environ.get("FUSED_DDPM_DEBUG", "0") == "1"

ITEMS_LIMIT = (1 << 31) - (1 << 16)  # the last program's item numbers still fit int32
VECTOR_BYTES = 16
WORDS = 4
WARP = 32


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor launch Triton: on CUDA, and on the CPU under TRITON_INTERPRET=1."""
    if tensor.is_cuda and triton is None:
        raise RuntimeError("CUDA tensors need Triton, which is not installed (pip install triton)")
    return tensor.is_cuda or INTERPRETED or _recorder.launches is not None


def reads_values(tensor: Tensor) -> bool:
    """Whether argument values are checked: always on the CPU, on CUDA only under FUSED_DDPM_DEBUG=1."""
    return tensor.device.type == "cpu" or DEBUG


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

    A run is `run` neighbours, one vector access. An item, the work of one thread, is `repeat` runs that are `lanes`
    runs apart, so that the threads of a warp touch neighbours; `lanes` items make a chunk, `per_row` chunks a sample.
    What a thread needs of its row (t, sample index) it finds once per item.

    The kernel finds the row of chunk q as q * magic >> shift, an exact division for q < 2^31 (Granlund & Montgomery
    1994, theorem 4.2 with N = 31). even: whether chunks fill rows without a rest, so that they follow each other in
    memory too.
    """

    run: int
    lanes: int
    repeat: int
    per_row: int
    total: int
    even: bool
    magic: int
    shift: int

    @classmethod
    def of(cls, n: int, numel: int, run: int, contiguous: bool = True) -> "Items":
        """run: neighbours that are wanted together, see `vector_run`; fewer are taken if they do not divide numel."""
        run = run if numel % run == 0 else WORDS
        whole = numel % run == 0
        runs = -(-numel // run)
        repeat = math.gcd(runs, ITEM_ELEMENTS // run) if whole else 1
        lanes = math.gcd(runs // repeat, WARP) if whole else 1
        per_row = runs // (lanes * repeat)
        total = n * per_row * lanes
        if numel >= 1 << 31:
            raise ValueError(f"got samples of {numel} elements, needs fewer than 2^31 each")
        if total >= ITEMS_LIMIT:
            raise ValueError(
                f"got {n} samples of {numel} elements, needs fewer than 2^31 items of {run * repeat} elements"
            )
        bits = math.ceil(math.log2(per_row)) if per_row > 1 else 0
        magic = -(-(1 << (31 + bits)) // max(per_row, 1))
        return cls(run, lanes, repeat, per_row, total, contiguous and whole, magic, 31 + bits)


def vector_run(*stored: Tensor | None) -> int:
    """Neighbours that make a 16-byte store of the widest type that is stored: 4 or 8, whole Philox calls.

    Narrower inputs (uint8) are read with as many elements: reading 16 bytes of them would hand a thread more
    neighbours than one store takes, and the exchange through shared memory costs more than it saves
    (uint8 -> float32 on sm_90: 49.7 instructions per element so, 41.9 with 4-byte loads).
    """
    widest = max(tensor.element_size() for tensor in stored if tensor is not None)
    return min(max(WORDS, VECTOR_BYTES // widest), 2 * WORDS)


@jit
def place(total, per_row, magic, shift, BLOCK: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """Of this program's items [BLOCK]: (which exist, row, first run within the row, first run of all, int64)."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, lane = q // LANES, q % LANES
    row = ((chunk.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint32)) >> shift).to(tl.uint32)
    first = (chunk - row.to(tl.int32) * per_row) * (LANES * REPEAT) + lane
    return q < total, row, first, chunk.to(tl.int64) * (LANES * REPEAT) + lane


@jit
def access(
    spot,
    j,
    shape,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Of the j-th runs of the items at `spot` = place(...): (run [B] in the row, offsets int64 [B, RUN], mask).

    shape: (numel, H*W, C). PLANES: whether a run never crosses channels, which saves a division per element.
    """
    live, row, first, start = spot
    numel, HW, C = shape
    run = first + j * LANES
    lane = tl.arange(0, RUN)[None, :]
    element = run[:, None] * RUN + lane
    mask = live[:, None] & (element < numel)
    if EVEN:
        offsets = (start + j * LANES)[:, None] * RUN + lane
        mask = live[:, None]
    elif CHANNELS_LAST and PLANES:
        channel = run * RUN // HW
        offsets = (row.to(tl.int64) * numel + (run * RUN - channel * HW) * C + channel)[:, None] + lane * C
        mask = live[:, None]
    elif CHANNELS_LAST:
        offsets = row.to(tl.int64)[:, None] * numel + (element % HW) * C + element // HW
    else:
        offsets = row.to(tl.int64)[:, None] * numel + element
    return run, offsets, mask


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
# 3x16x16 on sm_90, triton 3.7.1, counted by kernels/static.py; the bare kernels have 31.6 and 31.5:
#   45.7 and 45.7   before: a row looked up for every 8 or 4 elements, an exchange through shared memory in bf16,
#                   solver_step not multiplied out, Philox unrolled by Triton
#   39.2 and 39.8   16 elements (32 and 40 registers)
#   37.2 and 37.8   24 elements (48 registers: fewer warps per SM, and longer to compile)
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
        EVEN=items.even,
        PLANES=shape[1] % items.run == 0,
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
