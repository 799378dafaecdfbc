"""bottleneck: everything between the last down block and the first up block of the network.

    a = GELU(mean of x over its pixels)                       GELU(v) = v (1 + erf(v / sqrt 2)) / 2
    u = ConvTranspose(a), kernel = stride = s, so a product   u[c, i, j] = sum_k a[k] W[k, c, i, j] + up_bias[c]
    y = ReLU(GroupNorm(u))                                    (see group_norm_relu)
    out = film_scale * y + film_shift                         under guidance once for each half's film_scale

(Hendrycks & Gimpel: Gaussian Error Linear Units, 2016; Perez et al.: FiLM, 2018, equation 2.) Its `to_vec`, `up0`
and first gate. Inference only: no autograd.

When it is faster: docs/kernels.md. Every group pools again: a launch of its own for that would save 6 us at n = 1024
and cost 2 us at every batch (modelled for an H200).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native
from kernels.backend import Cost, jit, power_of_two, tl
from kernels.convolution import film_of
from kernels.group_norm_relu import check_images, check_vectors, in_cpp
from kernels.group_norm_relu import launch as group_norm_launch
from kernels.group_norm_relu import reference as group_norm_reference

SOURCE = native.source_of("bottleneck")
ROWS = 16  # images per program: the least that tl.dot takes
# Bytes of one weight row of a group: beyond them the accumulators of 16 images leave the registers and the staged
# weights the 99 KiB of shared memory that sm_86 and sm_89 have. 2048 hold 16x16 and (in 16 bit) 28x28 networks.
WIDEST = 2048
STAGE = 16384  # bytes of weights in flight per step of the product; untuned
POOLED = 8  # pixels loaded together; untuned


def pooled(x: Tensor) -> Tensor:
    """GELU of the mean over pixels: [n, C, h, w] -> [n, C]."""
    return F.gelu(x.mean((2, 3)))


def product(x: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
    """u of the equations in the memory layout of x: one matrix product, on the weights as they lie if they share it."""
    n, channels, height, width = x.shape
    if backend.is_channels_last(x):
        matrix = up_weight.permute(0, 2, 3, 1).reshape(channels, -1)
        up = torch.addmm(up_bias.to(x.dtype).repeat(height * width), pooled(x), matrix)
        return backend.like(up.reshape(n, height, width, channels).permute(0, 3, 1, 2), x)
    matrix = up_weight.reshape(channels, -1)
    up = torch.addmm(up_bias.to(x.dtype).repeat_interleave(height * width), pooled(x), matrix)
    return backend.like(up.reshape(x.shape), x)


def reference(x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, groups, eps) -> Tensor:
    """The equations above, of `bottleneck`'s arguments; for film_scale [k, n, C] the k results one behind the other."""
    up = product(x, up_weight, up_bias)
    y = group_norm_reference(up, norm_weight, norm_bias, groups, eps, film_scale, film_shift)
    return y.flatten(0, 1) if y.ndim == 5 else y


@jit
def bottleneck_kernel(
    x,
    up_weight,
    up_bias,
    norm_weight,
    norm_bias,
    film_scale,
    film_shift,
    out,
    n,
    eps,
    C: tl.constexpr,
    AREA: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT_CHANNELS_LAST: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    SHARED_SHIFT: tl.constexpr,
):
    first = tl.program_id(1) * GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n
    j = tl.arange(0, BLOCK_N)  # a group's outputs, in the order of their memory
    if CHANNELS_LAST:
        channel, pixel = first + j % GROUP, j // GROUP
    else:
        channel, pixel = first + j // AREA, j % AREA
    columns = pixel * C + channel if CHANNELS_LAST else channel * AREA + pixel
    weights = pixel * C + channel if WEIGHT_CHANNELS_LAST else channel * AREA + pixel
    exists = j < GROUP * AREA
    image = row[:, None] * (C * AREA)

    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < C
        weight_mask = known[:, None] & exists[None, :]
        if C % BLOCK_K == 0 and BLOCK_N == GROUP * AREA:
            weight_mask = tl.full((BLOCK_K, BLOCK_N), True, tl.int1)
        w = tl.load(up_weight + k[:, None].to(tl.int64) * (C * AREA) + weights[None, :], mask=weight_mask, other=0)
        total = tl.zeros((ROWS, BLOCK_K), tl.float32)
        inputs = x + image + (k[None, :] if CHANNELS_LAST else k[None, :] * AREA)
        for p in range(0, AREA, POOLED):
            for q in tl.static_range(POOLED):
                mask = live[:, None] & known[None, :]
                if AREA % POOLED != 0:
                    mask = mask & (p + q < AREA)
                total += tl.load(inputs + (p + q) * (C if CHANNELS_LAST else 1), mask=mask, other=0).to(tl.float32)
        mean = total * (1.0 / AREA)
        a = 0.5 * mean * (1.0 + tl.erf(mean * 0.7071067811865476))
        up = tl.dot(a.to(w.dtype), w, up, input_precision="ieee")

    up += tl.load(up_bias + channel, mask=exists, other=0).to(tl.float32)[None, :]
    count = GROUP * AREA * 1.0
    apart = tl.where(exists[None, :], up - (tl.sum(tl.where(exists[None, :], up, 0.0), 1) / count)[:, None], 0.0)
    apart *= tl.rsqrt(tl.sum(apart * apart, 1) / count + eps)[:, None]
    gain = tl.load(norm_weight + channel, mask=exists, other=0).to(tl.float32)[None, :]
    y = apart * gain + tl.load(norm_bias + channel, mask=exists, other=0).to(tl.float32)[None, :]
    y = tl.maximum(y, 0.0)
    if film_scale is not None:
        y *= film_of(film_scale, row, live, channel, exists, C, SHARED_SCALE)
    y += film_of(film_shift, row, live, channel, exists, C, SHARED_SHIFT)
    tl.store(out + image + columns[None, :], y.to(out.dtype.element_ty), mask=live[:, None] & exists[None, :])


def launch(*arguments: Any) -> Tensor:
    """One launch for each copy; for groups wider than WIDEST the library's product between pooling and group_norm_relu.

    Takes the reference's arguments. Copies repeat everything before FiLM: at small batches that is less than a launch
    of its own for the FiLM.
    """
    x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, groups, eps = arguments
    if film_scale is not None and film_scale.ndim == 3:
        tensors = (x, up_weight, up_bias, norm_weight, norm_bias)
        copies = [launch(*tensors, scale, film_shift, groups, eps) for scale in film_scale.unbind()]
        return torch.cat(copies).contiguous(memory_format=backend.memory_format(x))
    n, channels, *sides = x.shape
    area, group = sides[0] * sides[1], channels // groups
    up_bias, norm_weight, norm_bias = up_bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    film_scale, film_shift = None if film_scale is None else film_scale.contiguous(), film_shift.contiguous()
    block_n = max(power_of_two(group * area), ROWS)
    if block_n * x.element_size() > WIDEST:
        up = product(x, up_weight, up_bias)
        return group_norm_launch(up, norm_weight, norm_bias, groups, eps, film_scale, film_shift)
    out = torch.empty_like(x)
    tensors = (x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, out)
    backend.launch(
        bottleneck_kernel,
        (-(-n // ROWS), groups),
        *tensors,
        n,
        eps,
        C=channels,
        AREA=area,
        GROUP=group,
        ROWS=ROWS,
        BLOCK_K=min(max(STAGE // (block_n * x.element_size()), 16), 32),
        BLOCK_N=block_n,
        POOLED=min(area, POOLED),
        CHANNELS_LAST=backend.is_channels_last(x),
        WEIGHT_CHANNELS_LAST=backend.is_channels_last(up_weight),
        SHARED_SCALE=film_scale is not None and film_scale.shape[0] == 1,
        SHARED_SHIFT=film_shift.shape[0] == 1,
        num_warps=4 if block_n <= 256 else 8,
    )
    return out


def native_call(x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, out, groups, eps) -> list[int]:
    """The fields of native/bottleneck.h's struct; images and weights are channels_last."""
    n, channels, height, width = x.shape
    copies, rows = out.shape[0] // n, 1 if film_scale is None else film_scale.shape[-2]
    return backend.fields(
        *(x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, out),
        *(n, height * width, channels, groups, copies, rows, film_shift.shape[0], float(eps)),
    )


def _on_cpu(x: Tensor, *others: Any) -> Tensor:
    *tensors, groups, eps = others
    if in_cpp(SOURCE, x, *tensors):
        up_weight, *vectors = tensors
        out, up_weight = _fake(x, *others), up_weight.contiguous(memory_format=torch.channels_last)
        vectors = [None if vector is None else vector.contiguous() for vector in vectors]
        backend.launch_native(SOURCE, native_call(x, up_weight, *vectors, out, groups, eps))
        return out
    compute = backend.computed_in(x.dtype)
    y = reference(*(None if tensor is None else tensor.to(compute) for tensor in (x, *tensors)), groups, eps)
    return y.to(x.dtype).contiguous(memory_format=backend.memory_format(x))


def _fake(x: Tensor, *others: Any) -> Tensor:
    film_scale = others[4]
    if film_scale is None or film_scale.ndim == 2:
        return torch.empty_like(x)
    shape = (film_scale.shape[0] * x.shape[0], *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=backend.memory_format(x))


def _check_rows(x: Tensor, *others: Any) -> None:
    """Raise ValueError unless FiLM has rows for x. Asked while tracing, it would fix the number of images."""
    (n, channels), (film_scale, film_shift) = x.shape[:2], others[4:6]
    for name, film in (("film_scale", film_scale), ("film_shift", film_shift)):
        if film is None:
            continue
        copies = film.shape[:-2] if name == "film_scale" and film.ndim == 3 else ()
        if tuple(film.shape) not in ((*copies, n, channels), (*copies, 1, channels)) or 0 in copies:
            needs = f"[{n}, {channels}] or [1, {channels}]" + (", or k >= 1 of them" if name == "film_scale" else "")
            raise ValueError(f"{name}: got {film.dtype} {list(film.shape)}, needs a floating {needs}")


SCHEMA = "(Tensor x, Tensor up_weight, Tensor up_bias, Tensor norm_weight, Tensor norm_bias, Tensor? film_scale, "
SCHEMA += "Tensor film_shift, SymInt groups, float eps) -> Tensor"
operator = backend.register("bottleneck", launch, _on_cpu, _fake, _check_rows, signature=SCHEMA)


def bottleneck(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    film_scale: Tensor | None,
    film_shift: Tensor,
    groups: int = 8,
    eps: float = 1e-5,
) -> Tensor:
    """Pool to one pixel, GELU, transposed convolution back to x's size, GroupNorm, ReLU and FiLM, for inference.

    Args:
        x: float32, float16 or bfloat16 [n, C, h, w]; channels_last or contiguous, which the output shares.
        up_weight: [C, C, h, w] of x's type, channels_last or contiguous: read fastest in the layout of x.
        up_bias, norm_weight, norm_bias: [C], any floating type.
        film_scale, film_shift: [n, C], or [1, C] for all images; film_scale None = 1 (an unconditional network).
            film_scale may also be [k, n, C] or [k, 1, C]: k copies share x, as the halves of guidance do (the
            conditional one first), and the shift.
        groups: a divisor of C.
        eps: added to the variance.

    The pooled vector is rounded to x's type before the product, which accumulates in float32, as do the moments; where
    groups are too wide for one launch (see WIDEST) the product is rounded to x's type as well.

    Returns: [n, C, h, w] like x; of k copies [k * n, C, h, w], all images of copy 0 first. Not differentiable.
    """
    vectors = {"up_bias": up_bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    backend.check_tensors({"film_scale": film_scale}, x=x, up_weight=up_weight, film_shift=film_shift, **vectors)
    check_images(x, groups, eps)
    check_vectors(x.shape[1], **vectors)
    shape = (x.shape[1], *x.shape[1:])
    if up_weight.shape != shape or up_weight.dtype != x.dtype:
        raise ValueError(f"up_weight: got {up_weight.dtype} {list(up_weight.shape)}, needs {x.dtype} {list(shape)}")
    backend.check_layout("up_weight", up_weight)
    films = {"film_scale": film_scale, "film_shift": film_shift}
    for name, film in films.items():
        if film is not None:
            backend.check_floats(name, film, True, "a floating tensor", error=ValueError)
    backend.same_device(x, up_weight=up_weight, **films, **vectors)
    arguments = (x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, groups, eps)
    if not torch.compiler.is_compiling():
        _check_rows(*arguments)
    registered = backend.is_opaque(x) or in_cpp(SOURCE, *arguments[:-2])
    return (operator if registered else _on_cpu)(*arguments)


def cost(x: torch.dtype, channels: int, batch: int) -> Cost:
    """x read, the output written, the weights read once a batch; product, pooling, normalisation (8), FiLM (2)."""
    return Cost(bytes=x.itemsize * (2 + channels / batch), flops=2 * channels + 11)
