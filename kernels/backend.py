"""What every operator here shares: Triton, where it may run, the registration, checks of arguments, memory layouts.

Triton is optional: without it the operators run in C++ or as their references on CPU tensors and refuse CUDA tensors.
"""

import math
import os
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels import native

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

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # float64 on the CPU only
WARP = 32


@dataclass(frozen=True)
class Cost:
    """What an operator moves and computes per element: bytes of memory traffic, floating-point operations."""

    bytes: float
    flops: float


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor launch Triton: on CUDA, and on the CPU under TRITON_INTERPRET=1.

    Not where a program is recorded, which is of operators in C++.
    """
    if tensor.is_cuda and triton is None:
        raise RuntimeError("CUDA tensors need Triton, which is not installed (pip install triton)")
    return tensor.is_cuda or (INTERPRETED and not records_native()) or bool(_recordings)


def is_opaque(tensor: Tensor) -> bool:
    """Whether an operator of the network's inference form is called as the registered operator: where Triton runs.

    Elsewhere it is its reference inline, which Inductor fuses. Under torch.export it always is: exporters see plain
    operators.
    """
    return not torch.compiler.is_exporting() and runs_triton(tensor)


_library = torch.library.Library("fused_ddpm", "FRAGMENT")


def _not_differentiable(*_: object) -> None:
    raise RuntimeError("no gradient is known of this operator, which is for inference: needs torch.no_grad()")


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}  # what a registered operator runs, by its name


def register(
    name: str,
    launch: Callable[..., Any],
    on_cpu: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    signature: Callable[..., Any] | str | None = None,
    backward: Callable[..., Any] | None = _not_differentiable,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload:
    """The operator fused_ddpm::NAME: `launch` where Triton runs, `on_cpu` elsewhere.

    fake: makes the outputs of traced calls. check: raises for what tracing leaves out, see `reads_values`.
    signature: an annotated function that has the operator's arguments, default launch, or their schema.
    backward, setup_context: as torch.library.register_autograd takes them; None: no argument can require a gradient.

    Not `torch.library.custom_op`, whose wrapper takes 60 us a call, as long as a convolution at batch 1.
    """
    schema = signature
    if not isinstance(schema, str):
        schema = torch.library.infer_schema(signature or launch, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.fused_ddpm, name).default
    arguments = operator._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]

    def run(*given: Any) -> Any:
        if check is not None:
            check(*given)
        result = (launch if runs_triton(given[0]) else on_cpu)(*given)
        for i in written:
            if given[i] is not None:
                torch.autograd.graph.increment_version(given[i])
        return result

    unseen = bool(written) or backward is None  # by autograd, which must then record no reference either
    run = torch.no_grad()(run) if unseen else run
    IMPLEMENTATIONS[name] = run
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=_library)
    if unseen:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=_library)
    return operator


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that references compute in: float32, or float64 for it. torch.promote_types leaves a node in exports."""
    return dtype if dtype == torch.float64 else torch.float32


def reads_values(tensor: Tensor) -> bool:
    """Whether argument values are checked: on the CPU unless it is recorded, on CUDA under FUSED_DDPM_DEBUG=1."""
    if tensor.device.type == "cpu":
        return not records_native()
    return DEBUG and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all values are in low..high, where they are read."""
    if reads_values(tensor) and tensor.numel():
        least, most = (int(value) for value in torch.aminmax(tensor))
        if least < low or most > high:
            raise ValueError(f"{name}: got {least}..{most}, needs {low}..{high}")


def check_tensors(optional: Mapping[str, object] | None = None, /, **needed: object) -> None:
    """Raise TypeError unless all are tensors; those that are optional may be None."""
    for name, value in (needed | (optional or {})).items():
        if not isinstance(value, Tensor) and (value is not None or name in needed):
            raise TypeError(f"{name}: got a {type(value).__name__}, needs a tensor")


def same_device(first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors live where the first does."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: is on {other.device}, needs {first.device} like the first argument")


def check_floats(
    name: str,
    tensor: Tensor,
    fits: bool,
    needs: str,
    types: tuple[torch.dtype, ...] = FLOATS,
    error: type[Exception] = TypeError,
) -> None:
    """Raise an error unless the tensor has one of the types and `fits`, what it `needs`; float64 on CUDA is none."""
    if not fits or tensor.dtype not in types:
        raise error(f"{name}: got {tensor.dtype} {list(tensor.shape)}, needs {needs}")
    if tensor.is_cuda and tensor.dtype == torch.float64:
        also = " or uint8" if torch.uint8 in types else ""
        raise TypeError(f"{name}: got float64 on CUDA, needs float32, float16, bfloat16{also} there")


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is in a layout that kernels read, see `packed`."""
    if not (tensor.is_contiguous() or is_channels_last(tensor)):
        raise ValueError(f"{name}: has strides {tensor.stride()}, needs a channels_last or contiguous tensor")


def scalar(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar tensor on the device, made there without a copy from the host.

    Raises ValueError for a tensor elsewhere (copying it would stop the device) or of more than one element.
    """
    if not isinstance(value, Tensor):
        return torch.full((), float(value) if dtype.is_floating_point else value, dtype=dtype, device=device)
    if value.device != device or value.numel() != 1:
        needs = f"one on {device} like the first argument"
        raise ValueError(f"{name}: got {value.numel()} elements on {value.device}, needs {needs}")
    return value.reshape(()).to(dtype)


def vector(tensor: Tensor | None) -> Tensor | None:
    """A per-row argument as kernels index it: without strides, integers as int64."""
    if tensor is None:
        return None
    return (tensor if tensor.is_floating_point() else tensor.to(torch.int64)).contiguous()


def is_channels_last(tensor: Tensor) -> bool:
    """Whether images lie pixel by pixel. What is contiguous too, with one channel or pixel, is not."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    _, channels, height, width = tensor.shape
    # By strides as well: torch 2.11 denies it of a symbolic batch.
    strides = (channels * height * width, 1, width * channels, channels)
    return tensor.is_contiguous(memory_format=torch.channels_last) or tensor.stride() == strides


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last or, for everything else, contiguous."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def packed(tensor: Tensor) -> Tensor:
    """The tensor in a layout that kernels read: channels_last or contiguous, to which other strides are copied."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in the memory layout of `other`."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def power_of_two(least: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (least - 1).bit_length()


@dataclass(frozen=True)
class Launch:
    """One launch: what `ddpm-bench static` compiles for cards that are not here."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_recordings: list[list[Launch]] = []


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches instead of executing them: outputs stay uninitialised."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Run a Triton kernel on the device of its tensors; nothing for an empty grid."""
    if 0 in grid:
        return
    if _recordings:
        _recordings[-1].append(Launch(kernel, grid, args, constants, {"num_warps": num_warps}))
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **constants, num_warps=num_warps)
    else:
        kernel[grid](*args, **constants)


_recording_native = threading.local()
RecordedCall = Callable[[Path, Sequence[int]], None]


@contextmanager
def recording_native(append: RecordedCall) -> Iterator[None]:
    """This thread's calls of operators in C++ go to append(source, call) instead of being run: outputs stay as made."""
    _recording_native.append = append
    try:
        yield
    finally:
        del _recording_native.append


# Elements for each thread that is woken, as in PyTorch: to wake one costs some 5 us, or milliseconds where it slept.
THREAD_ELEMENTS = 32768


def fields(*values: Tensor | float | None) -> list[int]:
    """The fields of a struct that an operator in C++ takes: a tensor's address (None: 0), an integer, a double's bits.

    An address keeps no memory alive: the tensors must outlive the call.
    """
    return [_field(value) for value in values]


def _field(value: Tensor | float | None) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("q", struct.pack("d", value))[0]
    return 0 if value is None else int(value)


def extent(images: Tensor) -> tuple[int, int, int]:
    """(n, area, channels) as elements.h has them: one channel of all elements unless the tensor is channels_last."""
    if is_channels_last(images):
        return images.shape[0], images.shape[2] * images.shape[3], images.shape[1]
    return images.shape[0], math.prod(images.shape[1:]), 1


def has_memory(tensor: Tensor) -> bool:
    """Whether it is on the CPU and no stand-in, as tracers have them (FakeTensor), whose address is null."""
    return tensor.is_cpu and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def runs_native(source: Path, *tensors: Tensor | None) -> bool:
    """Whether an operator on these tensors runs in C++: float32 on the CPU, some elements, no gradient, and a compiler.

    Not where it is traced: who compiles or exports sees plain operators.
    """
    here = [tensor for tensor in tensors if tensor is not None]
    fits = all(has_memory(tensor) and tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in here)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not fits or traced or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in here)):
        return False
    return native.missing(source) is None


def records_native() -> bool:
    """Whether this thread's calls are recorded."""
    return hasattr(_recording_native, "append")


def launch_native(source: Path, call: Sequence[int], elements: int | None = None) -> None:
    """Run an operator in C++ (see `kernels.native`) on PyTorch's threads; few where there are few elements.

    call: the fields of its struct: addresses (0 for none), sizes, flags; doubles by their bits.
    Raises: MemoryError where the threads find no room.
    """
    if append := getattr(_recording_native, "append", None):
        append(source, call)
        return
    threads = torch.get_num_threads()
    if elements is not None:
        threads = min(threads, max(1, elements // THREAD_ELEMENTS))
    struct_of = array("q", call)
    if native.function(source)(struct_of.buffer_info()[0], threads):
        raise MemoryError(f"{source.stem}: no memory for its {threads} threads")
