"""group_norm_relu: the normalisation of the out head and what follows it, read once and written once.

    y = max(0, (x - mean) / sqrt(var + eps) * weight + bias),   mean and (biased) var over the C/groups channels of a
                                                                 group and all pixels of one image

(Wu & He: Group Normalization, 2018, equations 1-3 and 6.) Inference only: no autograd.

One program is one group of one image, so that a batch of one still has 8 of them; narrow groups (16 bytes per pixel in
bf16) fetch each 32-byte sector twice from L2 for it, modelled below the time of the copy. A group of more than TILE
elements is read twice, by one program: at batch 1 large images would want more programs per group. When it is faster:
docs/kernels.md.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native
from kernels.backend import Cost, jit, power_of_two, tl

SOURCE = native.source_of("group_norm_relu")

IMAGE_LIMIT = 1 << 31  # offsets within an image are 32 bit, those of images 64 bit
# Elements that a program holds in registers, at 16 a thread up to 8 warps: a group below this is read once. Untuned.
TILE = 8192
THREAD_ELEMENTS = 16


def _without_means(x: Tensor, groups: int) -> Tensor:
    """x less the mean of each group of each image, which its normalisation does not change."""
    means = x.mean((2, 3)).unflatten(1, (groups, -1)).mean(2)
    return x - means.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]


def reference(x, weight, bias, groups, eps, scale, shift) -> Tensor:
    """The equation above on x [n, C, H, W]; then scale * y + shift ([n, C] or [1, C], None = 1 and 0).

    A scale [k, n, C] gives [k, n, C, H, W].
    """
    # On channels_last tensors PyTorch's CPU kernel sums squares (7e-5 off at 8x64x64 with mean 3), so means go first:
    # 1.2 ms for [32, 64, 16, 16] on two cores with AVX-512, a contiguous copy and back 2.1.
    # What torch.compile generates takes them away itself.
    moved = x if torch.compiler.is_compiling() or x.is_contiguous() else _without_means(x, groups)
    y = F.group_norm(moved, groups, weight, bias, eps).relu_()
    if scale is not None:
        y = scale[..., None, None] * y
    return y if shift is None else y + shift[:, :, None, None]


@jit
def tile_of(i, C, AREA, GROUP, BLOCK_P, BLOCK_C, CHANNELS_LAST):
    """The i-th tile of a group: (offsets from the group's first element, mask), both [BLOCK_P, BLOCK_C]."""
    pixel, channel = i * BLOCK_P + tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    offsets = pixel * C + channel if CHANNELS_LAST else channel * AREA + pixel
    if BLOCK_C == GROUP and AREA % BLOCK_P == 0:
        mask = tl.full((BLOCK_P, BLOCK_C), True, tl.int1)
    else:
        mask = (pixel < AREA) & (channel < GROUP)
    return offsets, mask


@jit
def group_norm_relu_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    scale_stride,
    shift_stride,
    eps,
    C: tl.constexpr,
    AREA: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    image, first = (tl.program_id(0) // (C // GROUP)).to(tl.int64), tl.program_id(0) % (C // GROUP) * GROUP
    start = image * (C * AREA) + first * (1 if CHANNELS_LAST else AREA)
    # The first tile's moments, then each further tile's merged in (Chan, Golub & LeVeque 1983): no E[x^2] - E[x]^2.
    offsets, mask = tile_of(0, C, AREA, GROUP, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    value = tl.load(x + start + offsets, mask=mask, other=0).to(tl.float32)
    count = GROUP * min(AREA, BLOCK_P) * 1.0
    mean = tl.sum(tl.sum(value, 1), 0) / count
    apart = tl.where(mask, value - mean, 0.0)
    squares = tl.sum(tl.sum(apart * apart, 1), 0)
    for i in range(1, TILES):
        offsets, mask = tile_of(i, C, AREA, GROUP, BLOCK_P, BLOCK_C, CHANNELS_LAST)
        more = tl.load(x + start + offsets, mask=mask, other=0).to(tl.float32)
        before, here = i * (GROUP * BLOCK_P) * 1.0, tl.minimum(AREA - i * BLOCK_P, BLOCK_P) * GROUP * 1.0
        part = tl.sum(tl.sum(more, 1), 0) / here
        apart = tl.where(mask, more - part, 0.0)
        share = here / (before + here)
        squares += tl.sum(tl.sum(apart * apart, 1), 0) + (part - mean) * (part - mean) * before * share
        mean += (part - mean) * share

    channel = tl.arange(0, BLOCK_C)
    exists = channel < GROUP
    gain = tl.load(weight + first + channel, mask=exists, other=0).to(tl.float32)
    gain = (gain * tl.rsqrt(squares / (GROUP * AREA) + eps))[None, :]
    offset = tl.load(bias + first + channel, mask=exists, other=0).to(tl.float32)[None, :]
    if scale is not None:
        by = tl.load(scale + image * scale_stride + first + channel, mask=exists, other=0).to(tl.float32)[None, :]
    if shift is not None:
        plus = tl.load(shift + image * shift_stride + first + channel, mask=exists, other=0).to(tl.float32)[None, :]
    for i in range(TILES):
        offsets, mask = tile_of(i, C, AREA, GROUP, BLOCK_P, BLOCK_C, CHANNELS_LAST)
        if TILES > 1:
            value = tl.load(x + start + offsets, mask=mask, other=0).to(tl.float32)
        y = tl.maximum((value - mean) * gain + offset, 0.0)
        if scale is not None:
            y = by * y
        if shift is not None:
            y += plus
        tl.store(out + start + offsets, y.to(out.dtype.element_ty), mask=mask)


def launch(x, weight, bias, groups, eps, scale=None, shift=None) -> Tensor:
    """One pass over x, two where a group exceeds a tile; scale and shift as in the reference, for `bottleneck`."""
    out = torch.empty_like(x)
    n, channels, height, width = x.shape
    area, group = height * width, channels // groups
    block_c = power_of_two(group)
    block_p = min(power_of_two(area), max(1, TILE // block_c))
    backend.launch(
        group_norm_relu_kernel,
        (n * groups,),
        x,
        weight.contiguous(),
        bias.contiguous(),
        scale,
        shift,
        out,
        0 if scale is None or scale.shape[0] == 1 else channels,
        0 if shift is None or shift.shape[0] == 1 else channels,
        eps,
        C=channels,
        AREA=area,
        GROUP=group,
        TILES=-(-area // block_p),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        CHANNELS_LAST=backend.is_channels_last(x),
        num_warps=min(max(block_p * block_c // (THREAD_ELEMENTS * backend.WARP), 1), 8),
    )
    return out


def native_call(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, groups: int, eps: float) -> list[int]:
    """The fields of native/group_norm_relu.h's struct."""
    n, channels, height, width = x.shape
    return backend.fields(x, weight, bias, out, n, height * width, channels, groups, float(eps))


def in_cpp(source: Path, x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether a normalisation runs in C++ (see `backend.runs_native`): of images that lie pixel by pixel."""
    return x.is_contiguous(memory_format=torch.channels_last) and backend.runs_native(source, x, *vectors)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    if in_cpp(SOURCE, x, weight, bias):
        out, weight, bias = torch.empty_like(x), weight.contiguous(), bias.contiguous()
        backend.launch_native(SOURCE, native_call(x, weight, bias, out, groups, eps))
        return out
    compute = backend.computed_in(x.dtype)
    y = reference(x.to(compute), weight.to(compute), bias.to(compute), groups, eps, None, None)
    return backend.like(y.to(x.dtype), x)


operator = backend.register("group_norm_relu", launch, _on_cpu, lambda x, *_: torch.empty_like(x), signature=_on_cpu)


def check_images(x: Tensor, groups: int, eps: float) -> None:
    """Raise TypeError or ValueError unless x is [n, C, H, W] in a layout that kernels read, and groups divide C."""
    backend.check_floats("x", x, x.ndim == 4, "a floating tensor [n, C, H, W]")
    if 0 in x.shape[1:] or x.shape[1] * x.shape[2] * x.shape[3] >= IMAGE_LIMIT:
        raise ValueError(f"x: got {list(x.shape)}, needs 1 to 2^31 - 1 elements per image")
    backend.check_layout("x", x)
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups!r}, needs a divisor of x's {x.shape[1]} channels")
    if not (isinstance(eps, int | float) and 0 < eps < 1e38):
        raise ValueError(f"eps: got {eps!r}, needs a number > 0")


def check_vectors(channels: int, **vectors: Tensor) -> None:
    """Raise ValueError unless each is a floating tensor [channels]."""
    for name, vector in vectors.items():
        fits = vector.shape == (channels,)
        backend.check_floats(name, vector, fits, f"a floating tensor [{channels}]", error=ValueError)


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 8, eps: float = 1e-5) -> Tensor:
    """ReLU of GroupNorm, for inference (not differentiable).

    Args:
        x: float32, float16 or bfloat16 [n, C, H, W]; channels_last or contiguous, which the output shares.
        weight, bias: [C], any floating type.
        groups: a divisor of C.
        eps: added to the variance.

    Moments and arithmetic are float32 (float64 for float64, on the CPU only), rounded once.

    Returns: [n, C, H, W] like x.
    """
    backend.check_tensors(x=x, weight=weight, bias=bias)
    check_images(x, groups, eps)
    check_vectors(x.shape[1], weight=weight, bias=bias)
    backend.same_device(x, weight=weight, bias=bias)
    registered = backend.is_opaque(x) or in_cpp(SOURCE, x, weight, bias)
    return (operator if registered else _on_cpu)(x, weight, bias, groups, eps)


def cost(x: torch.dtype) -> Cost:
    """x read and written; mean, variance (3), normalisation (2), affine (2), ReLU."""
    return Cost(bytes=2 * x.itemsize, flops=9)
