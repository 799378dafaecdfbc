"""convolution: a 3x3 or 1x1 convolution of channels_last images with everything that follows it in the network.

    u = sum_s sum_tap W_s[:, :, tap] x_s[.., p + tap] + bias     stride 1, zero padding, one or two sources s
    v = film_scale * GELU(u) + film_shift + onto                 each of the three optional
    out = v | its maximum over 2x2 pixels | 4 C' channels as C' of 2x2 pixels

The second source is a skip connection: the sum is the convolution of the concatenation, which is never made; under
guidance x has twice its images, which share it. The last form is ConvTranspose with kernel = stride = 2. (Implicit
GEMM: Chetlur et al., cuDNN, 2014, section 3; FiLM: Perez et al. 2018, equation 2.) Inference only: no autograd.

Nothing was measured on a GPU yet (modelled: docs/kernels.md), so `kernel=False`, the library, is the default.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native
from kernels.backend import FLOATS, Cost, jit, power_of_two, tl
from kernels.packed import Packed, kind_of, pack

SOURCE = native.source_of("convolution")

LAST = torch.channels_last
KEEP, POOL, SPREAD = "keep", "pool", "spread"
ELEMENTS_LIMIT = (1 << 31) - (1 << 10)  # offsets are 32 bit, those of a last, partly empty tile too
# All of the following untuned.
PROGRAMS = 128  # what a launch should have at least: about a card's multiprocessors
STAGES = 3  # of loads in flight
LEAST_ROWS, MOST_ROWS = 16, 128  # of the product per program; 16 is the least that tl.dot takes
LEAST_COLUMNS, MOST_COLUMNS = 32, 64
MOST_CHANNELS = 64  # per step of the product
WARP_ELEMENTS = 1024  # of the product per warp, 4 to 8 warps: with 2048 two sources spill on sm_80


def reference(x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, gelu, then) -> Tensor:
    """The equations above, of the arguments of `convolution`."""
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    if skip is not None:
        shared = F.conv2d(skip, skip_weight, padding=skip_weight.shape[-1] // 2)
        # For any number of copies, so that torch.export may leave it open.
        y = (y.unflatten(0, (-1, skip.shape[0])) + shared).flatten(0, 1)
    y = F.gelu(y) if gelu else y
    y = y if film_scale is None else film_scale[:, :, None, None] * y
    y = y if film_shift is None else y + film_shift[:, :, None, None]
    y = y if onto is None else y + onto
    if then == POOL:
        return F.max_pool2d(y, 2)
    return F.pixel_shuffle(y.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2) if then == SPREAD else y


@jit
def pixels_of(m, H, W, POOLED):
    """(image, y, x) of row m of the product; pooled, four neighbours that become one follow each other."""
    if POOLED:
        cell, corner = m // 4, m % 4
        place = cell % (H // 2 * (W // 2))
        image = cell // (H // 2 * (W // 2))
        return image, place // (W // 2) * 2 + corner // 2, place % (W // 2) * 2 + corner % 2
    place = m % (H * W)
    return m // (H * W), place // W, place % W


@jit
def add_product(total, source, weight, image, y, x, live, column, exists, H, W, C, TAPS, BLOCK_K, STAGES):
    """total [BLOCK_M, BLOCK_N] plus one source's sum over taps and channels."""
    PARTS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    for i in tl.range(0, TAPS * PARTS, num_stages=STAGES):
        tap, c = i // PARTS, i % PARTS * BLOCK_K + k
        dy, dx = 0, 0
        if TAPS == 9:
            dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (live & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W))[:, None]
        there = exists[:, None]
        if C % BLOCK_K != 0:
            inside, there = inside & (c < C)[None, :], there & (c < C)[None, :]
        pixel = (image * H + y + dy) * W + x + dx
        a = tl.load(source + pixel[:, None] * C + c[None, :], mask=inside, other=0)
        w = tl.load(weight + column[:, None] * (TAPS * C) + (tap * C + c)[None, :], mask=there, other=0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    return total


@jit
def film_of(film, row, live, channel, exists, C, SHARED):
    """film[row, channel], or film[0, channel] for all rows."""
    if SHARED:
        values = tl.load(film + channel, mask=exists, other=0)[None, :]
    else:
        values = tl.load(film + row[:, None] * C + channel[None, :], mask=live[:, None] & exists[None, :], other=0)
    return values.to(tl.float32)


@jit
def largest(a, b):
    """The larger one; NaN if either is, as in the library's pooling."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# A batch never met compiles no new kernel.
@jit(do_not_specialize=("rows", "skip_images"))
def convolution_kernel(
    x,
    weight,
    bias,
    skip,
    skip_weight,
    film_scale,
    film_shift,
    onto,
    out,
    rows,
    skip_images,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SKIP_C: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GELU: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    SHARED_SHIFT: tl.constexpr,
    THEN: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, exists = m < rows, column < N
    image, py, px = pixels_of(m, H, W, THEN == "pool")
    v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    v = add_product(v, x, weight, image, py, px, live, column, exists, H, W, C, TAPS, BLOCK_K, STAGES)
    if skip is not None:
        other = image % skip_images
        v = add_product(v, skip, skip_weight, other, py, px, live, column, exists, H, W, SKIP_C, TAPS, BLOCK_K, STAGES)
    if bias is not None:
        v += tl.load(bias + column, mask=exists, other=0).to(tl.float32)[None, :]
    if GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    mask = live[:, None] & exists[None, :]
    if film_scale is not None:
        v *= film_of(film_scale, image, live, column, exists, N, SHARED_SCALE)
    if film_shift is not None:
        v += film_of(film_shift, image, live, column, exists, N, SHARED_SHIFT)
    if onto is not None:
        pixel = (image * H + py) * W + px
        v += tl.load(onto + pixel[:, None] * N + column[None, :], mask=mask, other=0).to(tl.float32)
    if THEN == "pool":
        v = tl.reduce(tl.reshape(v, (BLOCK_M // 4, 4, BLOCK_N)), 1, largest)
        cell = tl.program_id(0) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        mask = (cell * 4 < rows)[:, None] & exists[None, :]
        offsets = cell[:, None] * N + column[None, :]
    elif THEN == "spread":
        part, c = column // (N // 4), column % (N // 4)
        line = (image * H + py)[:, None] * 2 + (part // 2)[None, :]
        offsets = (line * (2 * W) + px[:, None] * 2 + (part % 2)[None, :]) * (N // 4) + c[None, :]
    else:
        offsets = m[:, None] * N + column[None, :]
    tl.store(out + offsets, v.to(out.dtype.element_ty), mask=mask)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of the product per program: large ones, unless too few programs would be left. Untuned."""
    across = min(max(power_of_two(columns), LEAST_ROWS), MOST_COLUMNS)
    down = MOST_ROWS
    while down > LEAST_ROWS and -(-rows // down) * -(-columns // across) < PROGRAMS:
        down //= 2
    if -(-rows // down) * -(-columns // across) < PROGRAMS:
        across = min(across, LEAST_COLUMNS)
    return down, across


def launch(*arguments: Any) -> Tensor:
    """One launch, of the reference's arguments; images and weights are read in channels_last."""
    x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, gelu, then = arguments
    images = (x, weight, skip, skip_weight, onto)
    images = (None if tensor is None else tensor.contiguous(memory_format=LAST) for tensor in images)
    x, weight, skip, skip_weight, onto = images
    bias, film_scale, film_shift = map(backend.vector, (bias, film_scale, film_shift))
    n, channels, height, width = x.shape
    columns, rows = weight.shape[0], n * height * width
    widest = max(channels, columns, 0 if skip is None else skip.shape[1])
    if rows * widest >= ELEMENTS_LIMIT:
        raise ValueError(f"x: got {list(x.shape)} for {columns} outputs, needs fewer than 2^31 elements in one call")
    out = _fake(x, weight, then)
    block_m, block_n = tile(rows, columns)
    tensors = (x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, out)
    backend.launch(
        convolution_kernel,
        (-(-rows // block_m), -(-columns // block_n)),
        *tensors,
        rows,
        1 if skip is None else skip.shape[0],
        H=height,
        W=width,
        C=channels,
        SKIP_C=0 if skip is None else skip.shape[1],
        N=columns,
        TAPS=weight.shape[2] * weight.shape[3],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(max(power_of_two(channels), LEAST_ROWS), MOST_CHANNELS),
        STAGES=STAGES,
        GELU=gelu,
        SHARED_SCALE=film_scale is not None and film_scale.shape[0] == 1,
        SHARED_SHIFT=film_shift is not None and film_shift.shape[0] == 1,
        THEN=then,
        num_warps=min(max(block_m * block_n // WARP_ELEMENTS, 4), 8),
    )
    return out


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    (n, _, height, width), columns, then = x.shape, weight.shape[0], others[-1]
    shape = (n, columns, height, width)
    if then == POOL:
        shape = (n, columns, height // 2, width // 2)
    elif then == SPREAD:
        shape = (n, columns // 4, 2 * height, 2 * width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def native_call(x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, out, gelu, then) -> list[int]:
    """The fields of native/convolution.h's struct, of laid out images and vectors and `Packed` weights."""
    (n, channels, height, width), (columns, _, size, _) = x.shape, weight.shape
    rows = (1 if tensor is None else tensor.shape[0] for tensor in (skip, onto, film_scale, film_shift))
    return backend.fields(
        *(
            x,
            weight.tensor,
            bias,
            skip,
            None if skip is None else skip_weight.tensor,
            film_scale,
            film_shift,
            onto,
            out,
        ),
        *(n, height, width, channels, 0 if skip is None else skip.shape[1], columns, size**2, weight.kind),
        *(*rows, gelu, (KEEP, POOL, SPREAD).index(then)),
    )


def launch_on_cpu(*arguments: Any) -> Tensor:
    """native/convolution.cpp, of the reference's arguments; weights may be `Packed`."""
    x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, gelu, then = arguments
    images = (x, skip, onto)
    x, skip, onto = (None if tensor is None else tensor.contiguous(memory_format=LAST) for tensor in images)
    bias, film_scale, film_shift = map(backend.vector, (bias, film_scale, film_shift))
    if isinstance(weight, Tensor):
        kind = kind_of(weight, *([] if skip is None else [skip_weight]), spread=then == SPREAD)
        weight, skip_weight = (None if each is None else pack(each, kind) for each in (weight, skip_weight))
    out = _fake(x, weight, then)
    call = native_call(x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, out, gelu, then)
    backend.launch_native(SOURCE, call)
    return out


def _on_cpu(x: Tensor, *others: Any) -> Tensor:
    if backend.runs_native(SOURCE, x, others[0]):
        return launch_on_cpu(x, *others)
    return reference(x, *others).contiguous(memory_format=LAST)


def _check_source(name: str, x: Tensor, weight: Tensor, dtype: torch.dtype, sides: tuple[int, ...]) -> None:
    if x.ndim != 4 or x.dtype != dtype or x.shape[2:] != sides:
        raise ValueError(f"{name}: got {x.dtype} {list(x.shape)}, needs {dtype} [n, C, {sides[0]}, {sides[1]}]")
    channels, size = x.shape[1], weight.shape[-1] if weight.ndim else 0
    if weight.dtype != dtype or weight.shape[1:] != (channels, size, size) or size not in (1, 3):
        needs = f"{dtype} [C', {channels}, k, k] with k 1 or 3"
        raise ValueError(f"{name}'s weight: got {weight.dtype} {list(weight.shape)}, needs {needs}")


def _check_packed(x: Tensor, weight: Packed, skip_weight: object) -> Tensor | None:
    """The skip's packed weights. Raises TypeError or ValueError unless x and they go with `weight`, which is packed."""
    fits = isinstance(x, Tensor) and backend.has_memory(x) and x.dtype == torch.float32
    if not fits or torch.compiler.is_compiling():
        found = f"{x.dtype} on {x.device}" if type(x) is Tensor else f"a {type(x).__name__}"
        raise TypeError(f"x: got {found}, packed weights need float32 on the CPU, and not to be traced")
    if skip_weight is None:
        return None
    if not isinstance(skip_weight, Packed) or skip_weight.kind != weight.kind:
        raise ValueError("skip_weight: needs weights packed as x's weight is, of the same kind")
    return skip_weight.tensor


def _check_sizes(x: Tensor, weight: Tensor, *others: Any) -> None:
    """Raise ValueError unless everything goes together. Asked while tracing, it would fix the number of images."""
    bias, skip, skip_weight, film_scale, film_shift, onto = others[:6]
    n, _, height, width = x.shape
    columns = weight.shape[0]
    if skip is not None and (skip_weight.shape[::2] != weight.shape[::2] or not skip.shape[0] or n % skip.shape[0]):
        needs = f"a divisor of x's {n} images and {columns} outputs, kernel {weight.shape[-1]}"
        raise ValueError(f"skip: got {skip.shape[0]} images and weight {list(skip_weight.shape)}, needs {needs}")
    for name, vector in {"bias": bias, "film_scale": film_scale, "film_shift": film_shift}.items():
        if vector is None:
            continue
        fits = ((columns,),) if name == "bias" else ((n, columns), (1, columns))
        if tuple(vector.shape) not in fits or vector.dtype != x.dtype:
            needs = " or ".join(map(str, map(list, fits)))
            raise ValueError(f"{name}: got {vector.dtype} {list(vector.shape)}, needs {x.dtype} {needs}")
    if onto is not None and (onto.shape != (n, columns, height, width) or onto.dtype != x.dtype):
        raise ValueError(f"onto: got {onto.dtype} {list(onto.shape)}, needs {x.dtype} {[n, columns, height, width]}")


SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor? skip, Tensor? skip_weight, Tensor? film_scale, "
SCHEMA += "Tensor? film_shift, Tensor? onto, bool gelu, str then) -> Tensor"
operator = backend.register("convolution", launch, _on_cpu, _fake, _check_sizes, signature=SCHEMA)


def convolution(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    skip_weight: Tensor | Packed | None = None,
    film_scale: Tensor | None = None,
    film_shift: Tensor | None = None,
    onto: Tensor | None = None,
    gelu: bool = False,
    then: str = KEEP,
    kernel: bool = False,
) -> Tensor:
    """Convolve with stride 1 and zero padding that keeps the size; then GELU, FiLM, a sum, and a change of shape.

    Args:
        x: float32, float16 or bfloat16 [n, C, h, w].
        weight: [C', C, k, k] of x's type, k 1 or 3. bias: [C'].
        skip, skip_weight: a second source [n / j, Cs, h, w] and its weights [C', Cs, k, k]; j copies of it are read.
        film_scale, film_shift: [n, C'] or [1, C'].
        onto: [n, C', h, w], added at last.
        then: "keep"; "pool", the maximum of 2x2 pixels (h and w even); "spread", channels (dy, dx, c) to 2x2 pixels.
        kernel: by one kernel: of Triton, on CUDA for float16 and bfloat16 alone; on the CPU in C++ for float32, where
            there is a compiler (`backend.runs_native`). Elsewhere and under torch.compile and torch.export by the
            library, as without it.

    Weights may be `packed.pack`ed for the kernel on the CPU, both of the same kind: else every call does it.
    Sums are float32, rounded once (by the library: to x's type after every operator).

    Returns: [n, C', h, w], [n, C', h/2, w/2] or [n, C'/4, 2h, 2w] of x's type; channels_last if x is, and by the kernel
    always. Not differentiable.
    """
    others = {"skip": skip, "skip_weight": skip_weight, "film_scale": film_scale, "film_shift": film_shift}
    others |= {"bias": bias, "onto": onto}
    is_packed = isinstance(weight, Packed)
    if is_packed:
        others |= {"skip_weight": _check_packed(x, weight, skip_weight)}
    backend.check_tensors(others, x=x, weight=weight.tensor if is_packed else weight)
    if x.ndim != 4 or x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, needs a floating tensor [n, C, h, w]")
    if kernel and x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        # Products of float32 without tensor cores: 4,104 bytes of registers spilled a thread (sm_90).
        raise ValueError(f"x: got {x.dtype} on CUDA, needs float16 or bfloat16 there, or kernel=False")
    _check_source("x", x, weight, x.dtype, x.shape[2:])
    if (skip is None) != (skip_weight is None):
        raise ValueError("skip and skip_weight: got one of them, needs both or none")
    if skip is not None:
        _check_source("skip", skip, skip_weight, x.dtype, x.shape[2:])
    arguments = (x, weight, bias, skip, skip_weight, film_scale, film_shift, onto, gelu, then)
    if not torch.compiler.is_compiling():
        _check_sizes(*arguments)
    if then not in (KEEP, POOL, SPREAD):
        raise ValueError(f"then: got {then!r}, needs {KEEP}, {POOL} or {SPREAD}")
    if then == POOL and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"x: got {list(x.shape)}, needs even sides to pool")
    if then == SPREAD and weight.shape[0] % 4:
        raise ValueError(f"weight: got {weight.shape[0]} outputs, needs a multiple of 4 to spread")
    if is_packed:
        return launch_on_cpu(*arguments) if x.numel() else _fake(x, weight, then)
    backend.same_device(x, weight=weight, **others)
    if kernel and (backend.is_opaque(x) or backend.runs_native(SOURCE, x, weight)):
        return operator(*arguments)
    y = reference(*arguments)
    if torch.compiler.is_compiling():  # who traces lays tensors out
        return y
    return y.contiguous(memory_format=LAST) if x.is_contiguous(memory_format=LAST) else y


def cost(dtype: torch.dtype, channels: int, columns: int, taps: int, then: str = KEEP) -> Cost:
    """Per element before `then`: x read once, the output written; one product and sum per weight."""
    written = 0.25 if then == POOL else 1
    return Cost(bytes=dtype.itemsize * (written + channels / columns), flops=2 * channels * taps)
