"""noise_mse: the training loss of noise prediction, with the noise drawn again instead of stored.

    loss = mean over samples of  weight_i * mean over elements of (pred_i - eps_i)^2,   eps from stream 2
    dloss/dpred_i = 2 weight_i (pred_i - eps_i) / (n elements)

(Ho, Jain, Abbeel 2020, equation 14; the weights are those of Hang et al. 2023, min-SNR).
"""

import torch
from torch import Tensor

from kernels import backend, philox
from kernels.backend import Cost, Items, jit, tl
from kernels.philox import Stream, tl_item_normals
from kernels.q_sample import FLOATS


def reference(pred: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """The first equation above: pred and noise [n, ...], weight [n] or None = ones; a scalar."""
    per_sample = (pred - noise).square().flatten(1).mean(dim=1)
    return (per_sample if weight is None else per_sample * weight).mean()


@jit(do_not_specialize=backend.COUNTS)
def noise_mse_kernel(
    pred,
    seed,
    samples,
    weight,
    grad,
    out,
    total,
    per_row,
    magic,
    shift,
    numel,
    HW,
    C,
    scale,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    RUN: tl.constexpr,
    LAYOUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Forward: out [programs] float32 gets each program's sum. Backward: out like pred gets the gradient."""
    spot = backend.place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT)
    live, row, shape = spot[0], spot[1], (numel, HW, C)
    sample = tl.load(samples + row, mask=live, other=0)
    key, zero = tl.load(seed), tl.full((), 0, tl.int32)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + row, mask=live, other=0).to(tl.float32)
    if BACKWARD:
        factor *= tl.load(grad).to(tl.float32) * scale
    # All loads stand before the first store: the tensors may alias for all the compiler knows.
    predicted = ()
    for j in tl.static_range(REPEAT):
        offsets, mask = backend.access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        predicted = predicted + (tl.load(pred + offsets, mask=mask),)
    squares = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(REPEAT):
        offsets, mask = backend.access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        z = tl_item_normals(key, zero, sample, STREAM, spot, j, HW, LANES, REPEAT, RUN, LAYOUT)
        error = predicted[j].to(tl.float32) - z
        if BACKWARD:
            tl.store(out + offsets, (error * factor[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            squares += tl.sum(tl.where(mask, error * error, 0.0), axis=1)
    if not BACKWARD:
        tl.store(out + tl.program_id(0), tl.sum(squares * factor) * scale)


def launch(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None, grad: Tensor | None) -> Tensor:
    """The loss (grad None), or its gradient in pred; the sum over programs has a fixed order, so it is repeatable."""
    original = pred
    pred, channels_last = backend.layout_of(pred)
    samples, weight = map(backend.vector, (samples, weight))
    shape = backend.geometry(pred, channels_last)
    n = pred.shape[0]
    items = Items.of(n, shape, backend.vector_run(pred))
    if grad is None:
        out = torch.empty(backend.programs(items), dtype=torch.float32, device=pred.device)
    else:
        out = torch.empty_like(pred)
    backend.launch_items(
        noise_mse_kernel,
        items,
        (pred, seed, samples, weight, grad, out),
        shape,
        (1.0 if grad is None else 2.0) / max(pred.numel(), 1),
        STREAM=int(Stream.TRAINING_NOISE),
        WEIGHTED=weight is not None,
        BACKWARD=grad is not None,
    )
    return out.sum() if grad is None else backend.like(out, original)


def _noise(pred: Tensor, seed: Tensor, samples: Tensor) -> Tensor:
    compute = torch.promote_types(pred.dtype, torch.float32)
    shape = tuple(pred.shape[1:])
    return philox.normal(seed, samples, 0, Stream.TRAINING_NOISE, shape, device=pred.device, dtype=compute)


@torch.library.custom_op("fused_ddpm::noise_mse", mutates_args=())
def operator(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    """The registered operator: seed is an int64 scalar tensor."""
    if backend.runs_triton(pred):
        return launch(pred, seed, samples, weight, None)
    noise = _noise(pred, seed, samples)
    return reference(pred.to(noise.dtype), noise, None if weight is None else weight.to(noise.dtype))


@operator.register_fake
def _(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    return pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))


@torch.library.custom_op("fused_ddpm::noise_mse_backward", mutates_args=())
def backward_operator(grad: Tensor, pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient in pred, in its dtype and layout; grad: a scalar tensor."""
    if backend.runs_triton(pred):
        return launch(pred, seed, samples, weight, grad)
    noise = _noise(pred, seed, samples)
    gradient = (pred.to(noise.dtype) - noise) * (grad * 2 / max(pred.numel(), 1))
    if weight is not None:
        gradient = gradient * weight.reshape(-1, *(1,) * (pred.ndim - 1))
    return backend.like(gradient.to(pred.dtype), pred)


@backward_operator.register_fake
def _(grad: Tensor, pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(pred)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return backward_operator(grad, *ctx.saved_tensors), None, None, None


operator.register_autograd(_backward, setup_context=_setup_context)


def noise_mse(pred: Tensor, seed: int | Tensor, samples: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error between a network's noise prediction and the noise that `q_sample` added.

    Args:
        pred: floating [n, ...], n >= 1; contiguous or channels_last.
        seed, samples: as given to `q_sample`; samples int64 [n].
        weight: float [n] per sample, default ones; gets no gradient.

    Returns: the loss, a float32 scalar (float64 for float64 pred), differentiable in pred; the same call gives the
    same bits.
    Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    if pred.ndim < 2 or pred.dtype not in FLOATS or pred.shape[0] == 0:
        raise TypeError(f"pred: got {pred.dtype} {list(pred.shape)}, needs a floating tensor [n, ...] with n >= 1")
    if pred.is_cuda and pred.dtype == torch.float64:
        raise TypeError("pred: got float64 on CUDA, needs float32, float16 or bfloat16 there")
    n = pred.shape[0]
    philox.check_seed(seed)
    philox.check_samples(samples)
    if samples.shape != (n,):
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{n}], one index per row of pred")
    if weight is not None and (weight.shape != (n,) or not weight.is_floating_point()):
        raise ValueError(f"weight: got {weight.dtype} {list(weight.shape)}, needs float [{n}]")
    backend.same_device(pred, samples=samples, weight=weight)
    return operator(pred, backend.scalar("seed", seed, torch.int64, pred.device), samples, weight)


def cost(pred: torch.dtype, backward: bool = False) -> Cost:
    """pred read; backward also writes the gradient. Difference, square (or product), sum on top of the normal."""
    return Cost(bytes=pred.itemsize * (2 if backward else 1), flops=3 + philox.NORMAL_FLOPS)
