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


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one-element tensor on the device, made there without a copy from the host."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Items:
    """How [n, numel] elements are dealt out: `width` neighbours make an item, `per_row` items a sample.

    The kernel finds the row of item q as q * magic >> shift, an exact division for q < 2^31 (Granlund & Montgomery
    1994, theorem 4.2 with N = 31). even: whether items fill rows without a rest, so that item q starts at q * width.
    """

    width: int
    per_row: int
    total: int
    even: bool
    magic: int
    shift: int

    @classmethod
    def of(cls, n: int, numel: int, widest: int, contiguous: bool = True) -> "Items":
        """widest: elements of the widest access that is wanted, 16 bytes of the smallest type involved."""
        width = widest
        while width > WORDS and numel % width:
            width //= 2
        per_row = -(-numel // width)
        if n * per_row >= ITEMS_LIMIT:
            raise ValueError(f"got {n} samples of {numel} elements, needs fewer than 2^31 items of {width} elements")
        bits = math.ceil(math.log2(per_row)) if per_row > 1 else 0
        magic = -(-(1 << (31 + bits)) // max(per_row, 1))
        return cls(width, per_row, n * per_row, contiguous and numel % width == 0, magic, 31 + bits)


def widest_access(*tensors: Tensor | None) -> int:
    """Elements in 16 bytes of the smallest element type, at least the four normals of a Philox call."""
    smallest = min(tensor.element_size() for tensor in tensors if tensor is not None)
    return max(WORDS, VECTOR_BYTES // smallest)


@jit
def row_of(item, magic, shift):
    """item // per_row, see `Items`."""
    return ((item.to(tl.uint64) * magic.to(tl.uint32)) >> shift).to(tl.int32)


@jit
def item_offsets(q, row, item, numel, HW, C, WIDTH: tl.constexpr, EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(offsets int64 [B, WIDTH] in memory, which of them are inside the row) of items q [B] of the whole tensor."""
    lane = tl.arange(0, WIDTH)[None, :]
    element = item[:, None] * WIDTH + lane
    if EVEN:
        offsets = q.to(tl.int64)[:, None] * WIDTH + lane
    elif CHANNELS_LAST:
        offsets = row.to(tl.int64)[:, None] * numel + (element % HW) * C + element // HW
    else:
        offsets = row.to(tl.int64)[:, None] * numel + element
    return offsets, element < numel


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


# Elements per program and warps: untuned, 16 elements per thread keep registers below 64 on sm_90.
PROGRAM_ELEMENTS = 2048
NUM_WARPS = 4


def launch_items(
    kernel: Any, items: Items, tensors: tuple[Any, ...], shape: tuple[int, int, int], *more: Any, **constants: Any
) -> None:
    """Launch a kernel over items; its arguments are (*tensors, total, per_row, magic, shift, numel, HW, C, *more)."""
    block = PROGRAM_ELEMENTS // items.width
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
        BLOCK=block,
        WIDTH=items.width,
        EVEN=items.even,
        num_warps=NUM_WARPS,
        **constants,
    )


def programs(items: Items) -> int:
    """How many programs `launch_items` starts."""
    return -(-items.total // (PROGRAM_ELEMENTS // items.width))


@dataclass(frozen=True)
class Cost:
    """What an operator moves and computes per element: bytes of memory traffic, floating-point operations."""

    bytes: float
    flops: float
