"""q_sample: diffuse clean data to time t, with its noise drawn on the spot.

    x_t = sqrt(alpha_bars[t]) x0 + sqrt(1 - alpha_bars[t]) eps,   eps ~ N(0, I) from stream 2

(Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, equation 4).
"""

import torch
from torch import Tensor

from kernels import philox


def pixels_to_unit(x0: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: x / 127.5 - 1. Floating input passes unchanged."""
    return x0.to(torch.float32) / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0


def reference(x0: Tensor, t: Tensor, alpha_bars: Tensor, noise: Tensor) -> Tensor:
    """The equation above on x0 [n, ...], t int64 [n], alpha_bars [T+1], noise like x0; in the dtype of `noise`."""
    alpha_bar = alpha_bars[t].to(noise.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
    return alpha_bar.sqrt() * pixels_to_unit(x0) + (1 - alpha_bar).sqrt() * noise


def check(x0: Tensor, t: Tensor, alpha_bars: Tensor, samples: Tensor) -> None:
    """Raise TypeError or ValueError for arguments that `q_sample` cannot take; values are read on the CPU only."""
    n = x0.shape[0] if x0.ndim else -1
    if n < 0 or not (x0.is_floating_point() or x0.dtype == torch.uint8):
        raise TypeError(f"x0: got {x0.dtype} {list(x0.shape)}, needs a floating or uint8 tensor [n, ...]")
    if t.dtype != torch.int64 or t.shape != (n,):
        raise TypeError(f"t: got {t.dtype} {list(t.shape)}, needs int64 [{n}]")
    if alpha_bars.ndim != 1 or not alpha_bars.is_floating_point():
        raise TypeError(f"alpha_bars: got {alpha_bars.dtype} {list(alpha_bars.shape)}, needs float32 [T+1]")
    if samples.shape != (n,):
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{n}], one index per row of x0")
    last = alpha_bars.shape[0] - 1
    if t.device.type == "cpu" and n and not (int(t.min()) >= 1 and int(t.max()) <= last):
        raise ValueError(f"t: got {int(t.min())}..{int(t.max())}, needs 1..{last}")


def q_sample(
    x0: Tensor,
    t: Tensor,
    alpha_bars: Tensor,
    seed: int | Tensor,
    samples: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffuse x0 to time t.

    Args:
        x0: [n, ...] floating, or uint8 (mapped to [-1, 1]).
        t: int64 [n] in 1..T.
        alpha_bars: float32 [T+1], alpha_bars[0] == 1.
        seed: of the noise contract, 0 <= seed < 2^63.
        samples: int64 [n], global training sample indices (noise of stream 2).
        dtype: of the outputs, default float32.

    Returns: (x_t, noise), both [n, ...] of `dtype`. Differentiable in x0.
    Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    check(x0, t, alpha_bars, samples)
    dtype = torch.float32 if dtype is None else dtype
    compute = torch.float64 if torch.float64 in (x0.dtype, dtype) else torch.float32
    noise = philox.normal(seed, samples, 0, philox.Stream.TRAINING_NOISE, x0.shape[1:], device=x0.device, dtype=compute)
    return reference(x0, t, alpha_bars, noise).to(dtype), noise.to(dtype)
