"""q_sample_rows: a whole training batch from a data set on the device, in one launch.

    t    = 1 + (r0 * T >> 32)                        r0 from stream 3
    x0   = data[rows] / 127.5 - 1, mirrored in its last axis iff r0 >> 31            r0 from stream 6
    x_t  = sqrt(alpha_bars[t]) x0 + sqrt(1 - alpha_bars[t]) eps                      eps from stream 2

(Ho, Jain, Abbeel 2020, algorithm 1, lines 2 to 4.) No DataLoader, no host work per step.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import backend, philox
from kernels.backend import FLOATS, Cost
from kernels.items import Items, launch_items
from kernels.philox import Stream
from kernels.q_sample import SOURCE, check_diffusion, native_call, pixels_to_unit, q_sample_kernel, runs_native
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
    noise = philox.normal_like(x0, seed, samples, Stream.TRAINING_NOISE, compute)
    x_t = diffuse(pixels_to_unit(x0), t, alpha_bars, noise)
    return x_t.to(dtype), t, noise.to(dtype)


def launch(data, rows, alpha_bars, seed, samples, flip, keep_noise, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: each row read once, x_t and t (and noise) written once, in the memory layout of the data."""
    data = backend.packed(data)
    x_t, t, noise = _empty(data, rows, flip, keep_noise, dtype)
    rows, alpha_bars, samples = map(backend.vector, (rows, alpha_bars, samples))
    tensors = (data, rows, alpha_bars, seed, samples, x_t, t, noise if keep_noise else None)
    more = (alpha_bars.shape[0] - 1, data.shape[-1] if flip else None)
    launch_items(q_sample_kernel, Items.of(data, x_t, n=rows.shape[0]), *tensors, more=more)
    return x_t, t, noise


def _empty(data: Tensor, rows: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, noise), the last without elements unless it is kept. options: the last two are keep_noise and dtype."""
    keep_noise, dtype = options[-2:]
    shape, layout = (rows.shape[0], *data.shape[1:]), backend.memory_format(data)
    x_t = torch.empty(shape, dtype=dtype, device=data.device, memory_format=layout)
    return x_t, rows.new_empty(rows.shape), torch.empty_like(x_t) if keep_noise else x_t.new_empty(0)


def _on_cpu(data: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, keep_noise, dtype = others
    if len(others[0]) and runs_native(data, others[1], dtype):
        rows, alpha_bars, seed, samples, flip = others
        x_t, t, noise = _empty(data, rows, flip, keep_noise, dtype)
        data, rows, alpha_bars, samples = backend.packed(data), *map(backend.vector, (rows, alpha_bars, samples))
        kept = noise if keep_noise else None
        call = native_call(data, rows, None, flip, alpha_bars, seed, samples, x_t, t, kept)
        backend.launch_native(SOURCE, call, x_t.numel())
        return x_t, t, noise
    x_t, t, noise = reference(data, *others, dtype)
    x_t, noise = (tensor.contiguous(memory_format=backend.memory_format(data)) for tensor in (x_t, noise))
    return x_t, t, noise if keep_noise else noise.new_empty(0)


def _check_values(data: Tensor, rows: Tensor, *others: object) -> None:
    backend.check_range("rows", rows, 0, data.shape[0] - 1)


SCHEMA = "(Tensor data, Tensor rows, Tensor alpha_bars, Tensor seed, Tensor samples, bool flip, bool keep_noise, "
SCHEMA += "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
operator = backend.register("q_sample_rows", launch, _on_cpu, _empty, _check_values, signature=SCHEMA)


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
    """
    backend.check_tensors(data=data, rows=rows, alpha_bars=alpha_bars, samples=samples)
    backend.check_floats("data", data, data.ndim > 1, "uint8 or floating [N, ...]", (*FLOATS, torch.uint8))
    backend.check_layout("data", data)
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise TypeError(f"rows: got {rows.dtype} {list(rows.shape)}, needs int64 [n]")
    check_diffusion(data, alpha_bars, dtype)
    philox.check_samples(samples, rows.shape[0], "the batch")
    backend.same_device(data, rows=rows, alpha_bars=alpha_bars, samples=samples)
    seed = philox.seed_tensor(seed, data.device)
    x_t, t, noise = operator(data, rows, alpha_bars, seed, samples, flip, keep_noise, dtype)
    return x_t, t, noise if keep_noise else None


def cost(data: torch.dtype, dtype: torch.dtype, keep_noise: bool = False) -> Cost:
    """A row read, x_t (and noise) written; five operations on top of the normal."""
    return Cost(bytes=data.itemsize + dtype.itemsize * (2 if keep_noise else 1), flops=5 + philox.NORMAL_FLOPS)
