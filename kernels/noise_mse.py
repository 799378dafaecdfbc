"""noise_mse: the training loss of noise prediction, with the noise drawn again instead of stored.

    loss = mean over samples of  weight_i * mean over elements of (pred_i - eps_i)^2,   eps from stream 2

(Ho, Jain, Abbeel 2020, equation 14; the weights are those of Hang et al. 2023, min-SNR).
"""

import torch
from torch import Tensor

from kernels import philox


def reference(pred: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """The equation above: pred and noise [n, ...], weight [n] or None = ones; a scalar."""
    per_sample = (pred - noise).square().flatten(1).mean(dim=1)
    return (per_sample if weight is None else per_sample * weight).mean()


def noise_mse(pred: Tensor, seed: int | Tensor, samples: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error between a network's noise prediction and the noise that `q_sample` added.

    Args:
        pred: floating [n, ...].
        seed, samples: as given to `q_sample`; samples int64 [n].
        weight: float [n] per sample, default ones.

    Returns: the loss, a float32 scalar (float64 for float64 pred), differentiable in pred.
    Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    if pred.ndim < 2 or not pred.is_floating_point():
        raise TypeError(f"pred: got {pred.dtype} {list(pred.shape)}, needs a floating tensor [n, ...]")
    n = pred.shape[0]
    if samples.shape != (n,):
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{n}], one index per row of pred")
    if weight is not None and weight.shape != (n,):
        raise ValueError(f"weight: got {list(weight.shape)}, needs [{n}]")
    compute = torch.promote_types(pred.dtype, torch.float32)
    noise = philox.normal(
        seed, samples, 0, philox.Stream.TRAINING_NOISE, pred.shape[1:], device=pred.device, dtype=compute
    )
    return reference(pred.to(compute), noise, weight)
