"""noise_mse: the training loss of noise prediction, with the noise drawn again instead of stored.

    loss = mean over samples of  weight_i * mean over elements of (pred_i - eps_i)^2,   eps from stream 2
    dloss/dpred_i = 2 weight_i (pred_i - eps_i) / (n elements)

(Ho, Jain, Abbeel 2020, equation 14; the weights are those of Hang et al. 2023, min-SNR).
"""

import torch
from torch import Tensor

from kernels import backend, native, philox
from kernels.backend import Cost, jit, tl
from kernels.items import COUNTS, Items, access, launch_items, place
from kernels.philox import Stream, tl_item_normals

SOURCE = native.source_of("noise_mse")


def reference(pred: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """The first equation above: pred and noise [n, ...], weight [n] or None = ones; a scalar."""
    per_sample = (pred - noise).square().flatten(1).mean(dim=1)
    return (per_sample if weight is None else per_sample * weight).mean()


@jit(do_not_specialize=COUNTS)
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
):
    """Without grad: out [programs] float32 gets each program's sum. With it: out like pred gets the gradient."""
    spot = place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT)
    live, row, shape = spot[0], spot[1], (numel, HW, C)
    sample = tl.load(samples + row, mask=live, other=0)
    key, zero = tl.load(seed), tl.full((), 0, tl.int32)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + row, mask=live, other=0).to(tl.float32)
    if grad is not None:
        factor *= tl.load(grad).to(tl.float32) * scale
    # All loads stand before the first store: the tensors may alias for all the compiler knows.
    predicted = ()
    for j in tl.static_range(REPEAT):
        offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        predicted = predicted + (tl.load(pred + offsets, mask=mask),)
    squares = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(REPEAT):
        offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        z = tl_item_normals(key, zero, sample, STREAM, spot, j, HW, LANES, REPEAT, RUN, LAYOUT)
        error = predicted[j].to(tl.float32) - z
        if grad is not None:
            tl.store(out + offsets, (error * factor[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            squares += tl.sum(tl.where(mask, error * error, 0.0), axis=1)
    if grad is None:
        tl.store(out + tl.program_id(0), tl.sum(squares * factor) * scale)


def launch(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None, grad: Tensor | None = None) -> Tensor:
    """The loss (grad None), or its gradient in pred; the sum over programs has a fixed order, so it is repeatable."""
    flat = backend.packed(pred)
    samples, weight = map(backend.vector, (samples, weight))
    items = Items.of(flat, flat)
    out = torch.empty_like(flat) if grad is not None else flat.new_empty(items.programs, dtype=torch.float32)
    scale = (1.0 if grad is None else 2.0) / max(pred.numel(), 1)
    tensors = (flat, seed, samples, weight, grad, out)
    launch_items(noise_mse_kernel, items, *tensors, more=(scale,), STREAM=int(Stream.TRAINING_NOISE))
    return out.sum() if grad is None else backend.like(out, pred)


def _noise(pred: Tensor, seed: Tensor, samples: Tensor) -> Tensor:
    return philox.normal_like(pred, seed, samples, Stream.TRAINING_NOISE, backend.computed_in(pred.dtype))


def native_call(
    pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None, grad: Tensor | None, out: Tensor
) -> list[int]:
    """The call of native/noise_mse.h."""
    return backend.fields(pred, seed, samples, weight, grad, out, *backend.extent(pred))


def _native(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None, grad: Tensor | None = None) -> Tensor:
    """The loss, or its gradient."""
    flat, samples = backend.packed(pred), backend.vector(samples)
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    out = pred.new_empty(()) if grad is None else torch.empty_like(flat)
    backend.launch_native(SOURCE, native_call(flat, seed, samples, weight, grad, out), pred.numel())
    return out if grad is None else backend.like(out, pred)


def _loss_on_cpu(pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    if backend.runs_native(SOURCE, pred):
        return _native(pred, seed, samples, weight)
    noise = _noise(pred, seed, samples)
    return reference(pred.to(noise.dtype), noise, None if weight is None else weight.to(noise.dtype))


def _gradient_on_cpu(grad: Tensor, pred: Tensor, seed: Tensor, samples: Tensor, weight: Tensor | None) -> Tensor:
    if backend.runs_native(SOURCE, pred, grad):
        return _native(pred, seed, samples, weight, grad)
    noise = _noise(pred, seed, samples)
    gradient = (pred.to(noise.dtype) - noise) * (grad * 2 / max(pred.numel(), 1))
    if weight is not None:
        gradient = gradient * weight.reshape(-1, *(1,) * (pred.ndim - 1))
    return backend.like(gradient.to(pred.dtype), pred)


def _fake_loss(pred: Tensor, *others: object) -> Tensor:
    return pred.new_empty((), dtype=backend.computed_in(pred.dtype))


backward_operator = backend.register(
    "noise_mse_backward",
    lambda grad, *others: launch(*others, grad),
    _gradient_on_cpu,
    lambda grad, pred, *others: torch.empty_like(pred),
    signature=_gradient_on_cpu,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return backward_operator(grad, *ctx.saved_tensors), None, None, None


operator = backend.register(
    "noise_mse",
    launch,
    _loss_on_cpu,
    _fake_loss,
    signature=_loss_on_cpu,
    backward=_backward,
    setup_context=_setup_context,
)


def noise_mse(pred: Tensor, seed: int | Tensor, samples: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error between a network's noise prediction and the noise that `q_sample` added.

    Args:
        pred: floating [n, ...], n >= 1; contiguous or channels_last.
        seed, samples: as given to `q_sample`; samples int64 [n].
        weight: float [n] per sample, default ones; gets no gradient.

    Returns: the loss, a float32 scalar (float64 for float64 pred), differentiable in pred; the same call gives the
    same bits.
    """
    backend.check_tensors({"weight": weight}, pred=pred, samples=samples)
    fits = pred.ndim > 1 and pred.shape[0] > 0
    backend.check_floats("pred", pred, fits, "a floating tensor [n, ...] with n >= 1")
    n = pred.shape[0]
    philox.check_samples(samples, n, "pred")
    if weight is not None and (weight.shape != (n,) or not weight.is_floating_point()):
        raise ValueError(f"weight: got {weight.dtype} {list(weight.shape)}, needs float [{n}]")
    backend.same_device(pred, samples=samples, weight=weight)
    return operator(pred, philox.seed_tensor(seed, pred.device), samples, weight)


def cost(pred: torch.dtype, backward: bool = False) -> Cost:
    """pred read; backward also writes the gradient. Difference, square (or product), sum on top of the normal."""
    return Cost(bytes=pred.itemsize * (2 if backward else 1), flops=3 + philox.NORMAL_FLOPS)
