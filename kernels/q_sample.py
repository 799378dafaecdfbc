"""q_sample: diffuse clean data to time t, with its noise drawn on the spot.

    x_t = sqrt(alpha_bars[t]) x0 + sqrt(1 - alpha_bars[t]) eps,   eps ~ N(0, I) from stream 2

(Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, equation 4).
"""

import torch
from torch import Tensor

from kernels import backend, native, philox
from kernels.backend import FLOATS, Cost, jit, tl
from kernels.items import COUNTS, Items, access, launch_items, place, within
from kernels.philox import Stream, tl_item_normals, tl_words

SOURCE = native.source_of("q_sample")
TRAINING_NOISE = tl.constexpr(int(Stream.TRAINING_NOISE))
TIMESTEP, AUGMENTATION = tl.constexpr(int(Stream.TIMESTEP)), tl.constexpr(int(Stream.AUGMENTATION))


def pixels_to_unit(x0: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: x / 127.5 - 1. Floating input passes unchanged."""
    return x0.to(torch.float32) / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0


def reference(x0: Tensor, t: Tensor, alpha_bars: Tensor, noise: Tensor) -> Tensor:
    """The equation above on x0 [n, ...], t int64 [n], alpha_bars [T+1], noise like x0; in the dtype of `noise`."""
    alpha_bar = alpha_bars[t].to(noise.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
    return alpha_bar.sqrt() * pixels_to_unit(x0) + (1 - alpha_bar).sqrt() * noise


@jit(do_not_specialize=COUNTS)
def q_sample_kernel(
    x0,
    given,
    alpha_bars,
    seed,
    samples,
    x_t,
    t,
    noise,
    total,
    per_row,
    magic,
    shift,
    numel,
    HW,
    C,
    timesteps,
    side,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    RUN: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """given [n]: the times if t is None, else (in `q_sample_rows`) the rows of x0, whose times are drawn into t.

    noise is not kept if it is None; nothing is mirrored if side, the length of the last axis, is None.
    """
    spot = place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT)
    live, row, first, shape = spot[0], spot[1], spot[2], (numel, HW, C)
    if t is None:
        alpha_bar = tl.load(alpha_bars + tl.load(given + row, mask=live, other=0), mask=live, other=1.0)
    sample = tl.load(samples + row, mask=live, other=0)
    key, zero = tl.load(seed), tl.full((), 0, tl.int32)
    if t is not None:
        start = (tl.load(given + row, mask=live, other=0) * numel)[:, None]
        # Every item draws its row's t again: one Philox call for 16 elements, no second launch.
        word, _, _, _ = tl_words(key, zero, sample, TIMESTEP, first * 0)
        step = 1 + ((word.to(tl.uint64) * timesteps) >> 32).to(tl.int64)
        alpha_bar = tl.load(alpha_bars + step, mask=live, other=1.0)
    if side is not None:
        word, _, _, _ = tl_words(key, zero, sample, AUGMENTATION, first * 0)
        mirrored = ((word >> 31) == 1)[:, None]
    # All loads stand before the first store: the tensors may alias for all the compiler knows.
    clean = ()
    for j in tl.static_range(REPEAT):
        offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        if t is not None:
            offsets, mask = within(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
            if side is not None:
                column = offsets // C % side
                offsets = tl.where(mirrored, offsets + (side - 1 - 2 * column) * C, offsets)
            offsets = start + offsets
        clean = clean + (tl.load(x0 + offsets, mask=mask, other=None if t is None else 0),)
    signal, spread = tl.sqrt(alpha_bar)[:, None], tl.sqrt(1.0 - alpha_bar)[:, None]
    if t is not None:
        tl.store(t + row, step, mask=live & (first == 0))
    for j in tl.static_range(REPEAT):
        offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        z = tl_item_normals(key, zero, sample, TRAINING_NOISE, spot, j, HW, LANES, REPEAT, RUN, LAYOUT)
        x = clean[j].to(tl.float32)
        if x0.dtype.element_ty == tl.uint8:
            x = x * (1 / 127.5) - 1.0
        out = signal * x + spread * z
        tl.store(x_t + offsets, out.to(x_t.dtype.element_ty), mask=mask)
        if noise is not None:
            tl.store(noise + offsets, z.to(noise.dtype.element_ty), mask=mask)


def launch(
    x0: Tensor, t: Tensor, alpha_bars: Tensor, seed: Tensor, samples: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One pass: reads x0 once, writes x_t and noise once, in the memory layout of x0."""
    clean = backend.packed(x0)
    t, alpha_bars, samples = map(backend.vector, (t, alpha_bars, samples))
    x_t, noise = torch.empty_like(clean, dtype=dtype), torch.empty_like(clean, dtype=dtype)
    tensors = (clean, t, alpha_bars, seed, samples, x_t, None, noise)
    launch_items(q_sample_kernel, Items.of(clean, x_t), *tensors, more=(None, None))
    return backend.like(x_t, x0), backend.like(noise, x0)


def native_call(
    data: Tensor,
    rows: Tensor | None,
    given: Tensor | None,
    flip: bool,
    alpha_bars: Tensor,
    seed: Tensor,
    samples: Tensor,
    x_t: Tensor,
    t: Tensor | None,
    noise: Tensor | None,
) -> list[int]:
    """The call of native/q_sample.h, of `q_sample` (given times) and of `q_sample_rows` (rows of data, t drawn)."""
    timesteps, (n, *rest), width = len(alpha_bars) - 1, backend.extent(x_t), x_t.shape[-1]
    tensors = (rows, given, flip, alpha_bars, timesteps, seed, samples, x_t, t, noise)
    return backend.fields(data, data.dtype == torch.uint8, *tensors, n, *rest, width)


def runs_native(data: Tensor, alpha_bars: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes them: float32, or uint8 data."""
    values = None if data.dtype == torch.uint8 and data.numel() else data
    return dtype == torch.float32 and backend.runs_native(SOURCE, values, alpha_bars)


def _on_cpu(x0, t, alpha_bars, seed, samples, dtype) -> tuple[Tensor, Tensor]:
    if runs_native(x0, alpha_bars, dtype):
        clean = backend.packed(x0)
        t, alpha_bars, samples = map(backend.vector, (t, alpha_bars, samples))
        x_t, noise = (torch.empty_like(clean, dtype=dtype) for _ in range(2))
        call = native_call(clean, None, t, False, alpha_bars, seed, samples, x_t, None, noise)
        backend.launch_native(SOURCE, call, x_t.numel())
        return backend.like(x_t, x0), backend.like(noise, x0)
    compute = torch.float64 if torch.float64 in (x0.dtype, dtype) else torch.float32
    noise = philox.normal_like(x0, seed, samples, Stream.TRAINING_NOISE, compute)
    x_t = reference(x0, t, alpha_bars, noise)
    return backend.like(x_t.to(dtype), x0), backend.like(noise.to(dtype), x0)


def _check_values(x0: Tensor, t: Tensor, alpha_bars: Tensor, *others: object) -> None:
    backend.check_range("t", t, 1, alpha_bars.shape[0] - 1)


def _fake(x0: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0, dtype=others[-1]), torch.empty_like(x0, dtype=others[-1])


def _setup_context(ctx, inputs, output) -> None:
    x0, t, alpha_bars, *_ = inputs
    ctx.save_for_backward(t, alpha_bars)
    ctx.dtype = x0.dtype


def _backward(ctx, grad_x_t: Tensor, grad_noise: Tensor | None):
    t, alpha_bars = ctx.saved_tensors
    if not ctx.dtype.is_floating_point:
        return (None,) * 6
    scale = alpha_bars[t].sqrt().to(grad_x_t.dtype).reshape(-1, *(1,) * (grad_x_t.ndim - 1))
    return (scale * grad_x_t).to(ctx.dtype), None, None, None, None, None


operator = backend.register(
    "q_sample", launch, _on_cpu, _fake, _check_values, backward=_backward, setup_context=_setup_context
)


def check_diffusion(x0: Tensor, alpha_bars: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError for alpha_bars on the device of x0 and a type of x_t that kernels cannot take."""
    types = (torch.float32,) if x0.is_cuda else (torch.float32, torch.float64)
    if alpha_bars.ndim != 1 or alpha_bars.shape[0] < 2 or alpha_bars.dtype not in types:
        raise TypeError(f"alpha_bars: got {alpha_bars.dtype} {list(alpha_bars.shape)}, needs float32 [T+1]")
    if dtype not in FLOATS or (x0.is_cuda and dtype == torch.float64):
        raise TypeError(f"dtype: got {dtype}, needs float32, float16 or bfloat16 (float64 on the CPU)")


def q_sample(
    x0: Tensor, t: Tensor, alpha_bars: Tensor, seed: int | Tensor, samples: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Diffuse x0 to time t.

    Args:
        x0: [n, ...] floating, or uint8 (mapped to [-1, 1]); contiguous or channels_last, which the outputs share.
        t: int64 [n] in 1..T. Values are checked on the CPU, and on CUDA under FUSED_DDPM_DEBUG=1.
        alpha_bars: float32 [T+1], alpha_bars[0] == 1.
        seed: of the noise contract, 0 <= seed < 2^63, or an int64 tensor of one element.
        samples: int64 [n], global training sample indices (noise of stream 2).
        dtype: of the outputs, default float32.

    Returns: (x_t, noise), both [n, ...] of `dtype`. Differentiable in x0.
    """
    backend.check_tensors(x0=x0, t=t, alpha_bars=alpha_bars, samples=samples)
    dtype = torch.float32 if dtype is None else dtype
    types = (*FLOATS, torch.uint8)
    backend.check_floats("x0", x0, x0.ndim > 0, "a floating or uint8 tensor [n, ...]", types)
    n = x0.shape[0]
    if t.dtype != torch.int64 or t.shape != (n,):
        raise TypeError(f"t: got {t.dtype} {list(t.shape)}, needs int64 [{n}]")
    check_diffusion(x0, alpha_bars, dtype)
    philox.check_samples(samples, n, "x0")
    backend.same_device(x0, t=t, alpha_bars=alpha_bars, samples=samples)
    seed = philox.seed_tensor(seed, x0.device)
    x_t, noise = operator(x0, t, alpha_bars, seed, samples, dtype)
    return x_t, noise.detach()


def cost(x0: torch.dtype, dtype: torch.dtype) -> Cost:
    """x0 read, x_t and noise written; three operations on top of the normal."""
    return Cost(bytes=x0.itemsize + 2 * dtype.itemsize, flops=3 + philox.NORMAL_FLOPS)
