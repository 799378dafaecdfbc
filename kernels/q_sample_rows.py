"""q_sample_rows: a whole training batch from a data set on the device, in one launch.

    t    = 1 + (r0 * T >> 32)                        r0 from stream 3
    x0   = data[rows] / 127.5 - 1, mirrored in its last axis iff r0 >> 31            r0 from stream 6
    x_t  = sqrt(alpha_bars[t]) x0 + sqrt(1 - alpha_bars[t]) eps                      eps from stream 2

(Ho, Jain, Abbeel 2020, algorithm 1, lines 2 to 4.) No DataLoader, no host work per step.
"""

import torch
from torch import Tensor

from kernels import backend, philox
from kernels.backend import Cost, Items, jit, tl
from kernels.philox import Stream, tl_item_normals, tl_words
from kernels.q_sample import FLOATS, pixels_to_unit
from kernels.q_sample import reference as diffuse


def reference(
    data: Tensor, rows: Tensor, alpha_bars: Tensor, seed: Tensor, samples: Tensor, flip: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations above: (x_t, t, noise)."""
    x0 = data[rows]
    if flip:
        mirrored = philox.flipped(seed, samples).reshape(-1, *(1,) * (x0.ndim - 1))
        x0 = torch.where(mirrored, x0.flip(-1), x0)
    t = philox.training_timesteps(seed, samples, alpha_bars.shape[0] - 1)
    compute = torch.promote_types(dtype, torch.float32)
    shape = tuple(x0.shape[1:])
    noise = philox.normal(seed, samples, 0, Stream.TRAINING_NOISE, shape, device=x0.device, dtype=compute)
    x_t = diffuse(pixels_to_unit(x0), t, alpha_bars, noise)
    return x_t.to(dtype), t, noise.to(dtype)


@jit(do_not_specialize=backend.COUNTS)
def q_sample_rows_kernel(
    data,
    rows,
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
    NOISE_STREAM: tl.constexpr,
    TIMESTEP_STREAM: tl.constexpr,
    FLIP_STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    RUN: tl.constexpr,
    LAYOUT: tl.constexpr,
    PIXELS: tl.constexpr,
    FLIP: tl.constexpr,
    KEEP_NOISE: tl.constexpr,
):
    spot = backend.place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT)
    live, row, first = spot[0], spot[1], spot[2]
    shape = (numel, HW, C)
    key, zero = tl.load(seed), tl.full((), 0, tl.int32)
    sample = tl.load(samples + row, mask=live, other=0)
    start = (tl.load(rows + row, mask=live, other=0) * numel)[:, None]
    # Every item draws its row's t again: one Philox call for 16 elements, no second launch.
    word, _, _, _ = tl_words(key, zero, sample, TIMESTEP_STREAM, first * 0)
    step = 1 + ((word.to(tl.uint64) * timesteps) >> 32).to(tl.int64)
    alpha_bar = tl.load(alpha_bars + step, mask=live, other=1.0)
    mirrored = live
    if FLIP:
        flip_word, _, _, _ = tl_words(key, zero, sample, FLIP_STREAM, first * 0)
        mirrored = (flip_word >> 31) == 1
    # All loads stand before the first store: the tensors may alias for all the compiler knows.
    clean = ()
    for j in tl.static_range(REPEAT):
        inside, mask = backend.within(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        if FLIP:
            column = inside // C % side
            inside = tl.where(mirrored[:, None], inside + (side - 1 - 2 * column) * C, inside)
        clean = clean + (tl.load(data + (start + inside), mask=mask, other=0),)
    signal, spread = tl.sqrt(alpha_bar)[:, None], tl.sqrt(1.0 - alpha_bar)[:, None]
    tl.store(t + row, step, mask=live & (first == 0))
    for j in tl.static_range(REPEAT):
        offsets, mask = backend.access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        z = tl_item_normals(key, zero, sample, NOISE_STREAM, spot, j, HW, LANES, REPEAT, RUN, LAYOUT)
        x = clean[j].to(tl.float32)
        if PIXELS:
            x = x * (1 / 127.5) - 1.0
        out = signal * x + spread * z
        tl.store(x_t + offsets, out.to(x_t.dtype.element_ty), mask=mask)
        if KEEP_NOISE:
            tl.store(noise + offsets, z.to(noise.dtype.element_ty), mask=mask)


def launch(
    data: Tensor,
    rows: Tensor,
    alpha_bars: Tensor,
    seed: Tensor,
    samples: Tensor,
    flip: bool,
    keep_noise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: each row read once, x_t and t (and noise) written once, in the memory layout of the data."""
    data, channels_last = backend.layout_of(data)
    rows, alpha_bars, samples = map(backend.vector, (rows, alpha_bars, samples))
    n = rows.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_t = torch.empty((n, *data.shape[1:]), dtype=dtype, device=data.device, memory_format=layout)
    noise = torch.empty_like(x_t) if keep_noise else x_t.new_empty(0)
    t = torch.empty(n, dtype=torch.int64, device=data.device)
    shape = backend.geometry(data, channels_last)
    items = Items.of(n, shape, backend.vector_run(x_t))
    backend.launch_items(
        q_sample_rows_kernel,
        items,
        (data, rows, alpha_bars, seed, samples, x_t, t, noise),
        shape,
        alpha_bars.shape[0] - 1,
        data.shape[-1],
        NOISE_STREAM=int(Stream.TRAINING_NOISE),
        TIMESTEP_STREAM=int(Stream.TIMESTEP),
        FLIP_STREAM=int(Stream.AUGMENTATION),
        PIXELS=data.dtype == torch.uint8,
        FLIP=flip,
        KEEP_NOISE=keep_noise,
    )
    return x_t, t, noise


@torch.library.custom_op("fused_ddpm::q_sample_rows", mutates_args=())
def operator(
    data: Tensor,
    rows: Tensor,
    alpha_bars: Tensor,
    seed: Tensor,
    samples: Tensor,
    flip: bool,
    keep_noise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator: seed is an int64 scalar tensor; noise is empty unless kept."""
    last = data.shape[0] - 1
    if backend.reads_values(rows) and rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) <= last):
        raise ValueError(f"rows: got {int(rows.min())}..{int(rows.max())}, needs 0..{last}")
    if backend.runs_triton(data):
        return launch(data, rows, alpha_bars, seed, samples, flip, keep_noise, dtype)
    x_t, t, noise = reference(data, rows, alpha_bars, seed, samples, flip, dtype)
    layout = torch.channels_last if backend.layout_of(data)[1] else torch.contiguous_format
    x_t, noise = (tensor.contiguous(memory_format=layout) for tensor in (x_t, noise))
    return x_t, t, noise if keep_noise else noise.new_empty(0)


@operator.register_fake
def _(
    data: Tensor,
    rows: Tensor,
    alpha_bars: Tensor,
    seed: Tensor,
    samples: Tensor,
    flip: bool,
    keep_noise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last if backend.layout_of(data)[1] else torch.contiguous_format
    shape = (rows.shape[0], *data.shape[1:])
    x_t = torch.empty(shape, dtype=dtype, device=data.device, memory_format=layout)
    noise = torch.empty_like(x_t) if keep_noise else x_t.new_empty(0)
    return x_t, rows.new_empty(rows.shape), noise


def q_sample_rows(
    data: Tensor,
    rows: Tensor,
    alpha_bars: Tensor,
    seed: int | Tensor,
    samples: Tensor,
    *,
    flip: bool = False,
    keep_noise: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather rows of a data set, normalise, mirror, draw t, diffuse: what a training step needs of its data.

    Args:
        data: uint8 (mapped to [-1, 1]) or floating [N, ...], contiguous or channels_last, which x_t shares.
        rows: int64 [n] in 0..N-1, checked where `q_sample`'s t is.
        alpha_bars: float32 [T+1], alpha_bars[0] == 1.
        seed, samples: of the noise contract; samples int64 [n], global training sample indices.
        flip: mirror half of the samples in the last axis. keep_noise: also return the noise. dtype: of x_t and noise.

    Returns: (x_t [n, ...], t int64 [n], noise [n, ...] or None); `noise_mse` needs no noise.
    Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    if data.ndim < 2 or data.dtype not in (*FLOATS, torch.uint8) or (data.is_cuda and data.dtype == torch.float64):
        raise TypeError(f"data: got {data.dtype} {list(data.shape)}, needs uint8 or float32 [N, ...]")
    if backend.layout_of(data)[0] is not data:
        raise ValueError(f"data: has strides {data.stride()}, needs a contiguous or channels_last tensor")
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise TypeError(f"rows: got {rows.dtype} {list(rows.shape)}, needs int64 [n]")
    types = (torch.float32,) if data.is_cuda else (torch.float32, torch.float64)
    if alpha_bars.ndim != 1 or alpha_bars.dtype not in types:
        raise TypeError(f"alpha_bars: got {alpha_bars.dtype} {list(alpha_bars.shape)}, needs float32 [T+1]")
    if dtype not in FLOATS or (data.is_cuda and dtype == torch.float64):
        raise TypeError(f"dtype: got {dtype}, needs float32, float16 or bfloat16 (float64 on the CPU)")
    philox.check_seed(seed)
    philox.check_samples(samples)
    if samples.shape != rows.shape:
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{rows.shape[0]}], one index per row")
    backend.same_device(data, rows=rows, alpha_bars=alpha_bars, samples=samples)
    seed = backend.scalar("seed", seed, torch.int64, data.device)
    x_t, t, noise = operator(data, rows, alpha_bars, seed, samples, flip, keep_noise, dtype)
    return x_t, t, noise if keep_noise else None


def cost(data: torch.dtype, dtype: torch.dtype, keep_noise: bool = False) -> Cost:
    """A row read, x_t (and noise) written; five operations on top of the normal."""
    return Cost(bytes=data.itemsize + dtype.itemsize * (2 if keep_noise else 1), flops=5 + philox.NORMAL_FLOPS)
