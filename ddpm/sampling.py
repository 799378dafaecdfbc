"""Sampling: one function for every engine."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm.engines import choose
from ddpm.noise import Noise, PhiloxNoise
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import make_table
from kernels import philox

logger = logging.getLogger("ddpm")

Callback = Callable[[int, Tensor], None]

# Rows per chunk when `batch_size` is None: untuned, 256 keeps a 64-wide 16x16 network's activations below 1 GiB.
CHUNK_PIXELS = 256 * 16 * 16


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one sample: the model's `sample_shape`, or (in_channels, height, height)."""
    if hasattr(model, "sample_shape"):
        return tuple(model.sample_shape)
    if hasattr(model, "in_channels") and hasattr(model, "height"):
        return model.in_channels, model.height, model.height
    raise TypeError(f"model: {type(model).__name__} needs an attribute sample_shape, or in_channels and height")


def chunk_size(shape: tuple[int, ...]) -> int:
    """Samples per chunk when nobody says."""
    return max(1, CHUNK_PIXELS // math.prod(shape[1:]))


def _checked(noise: Noise, dtype: torch.dtype) -> Noise:
    """The same noise in the state's type; ValueError if it comes in another shape."""

    def draw(samples: Tensor, step: int, stream: int, shape: tuple[int, ...]) -> Tensor:
        z = noise(samples, step, stream, shape)
        if tuple(z.shape) != (len(samples), *shape):
            raise ValueError(f"noise: returned {list(z.shape)}, needs {[len(samples), *shape]}")
        return z.to(dtype)

    return draw


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; for CPU tensors PyTorch has no exception of its own."""
    words = ("can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients or autocast; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters(), torch.empty(0)).device.type
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _contexts(context: Tensor | None, n: int, device: torch.device) -> Tensor | None:
    """[n, n_cfeat] from [n_cfeat] or [n, n_cfeat]."""
    if context is None:
        return None
    context = torch.as_tensor(context, dtype=torch.float32, device=device)
    if context.ndim == 1:
        context = context.expand(n, -1)
    if context.ndim != 2 or context.shape[0] != n:
        raise ValueError(f"context: got shape {list(context.shape)}, needs [n_cfeat] or [{n}, n_cfeat]")
    if not context.isfinite().all():
        raise ValueError("context: got NaN or infinite values, needs finite ones")
    return context


def sample(
    model: nn.Module,
    schedule: NoiseSchedule,
    n: int,
    *,
    solver: str = "ddpm",
    steps: int | None = None,
    context: Tensor | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    first_sample: int = 0,
    engine: str = "auto",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    **table_options: object,
) -> Tensor:
    """Draw n samples. Sample k depends on (weights, table, seed, first_sample + k) alone.

    Args:
        model: forward(x [n, *shape], t [n] float in (0, 1], c [n, n_cfeat] or None); runs in eval mode, on its device.
        schedule: the one it was trained with.
        n: how many, >= 1.
        solver, steps, table_options: see `make_table` (eta, variance, prediction, clip, spacing).
        context: float [n_cfeat] for all, or [n, n_cfeat]; None = unconditional (zeros).
        guidance: w in m_uncond + w (m_cond - m_uncond); 1 = conditional only. Any other needs a context.
        seed: 0 <= seed < 2^63. first_sample: global index of the first sample, >= 0.
        engine: how to execute the steps, see `ddpm.engines`; `auto` chooses and logs what it chose.
        dtype: what the network computes in. The state is float32, or float64 for float64.
        batch_size: samples per chunk, default by image size; results do not depend on it. A chunk that runs out of
            memory starts again with half as many, which a note says.
        noise: noise(samples, step, stream, shape) -> [n, *shape] instead of Philox.
        callback: callback(step, x0) after every step of every chunk: step counts 0..S-1, x0 [chunk, *shape] is
            the current estimate of the result, overwritten by later steps. It costs a second state in memory and,
            in the graph engine, replays of single steps.

    Returns: float32 [n, *shape] on the model's device, not clamped.
    Raises: ValueError or TypeError naming the argument; RuntimeError if the engine cannot run here.
    """
    for name, value, low in (("n", n, 1), ("batch_size", batch_size, 1), ("first_sample", first_sample, 0)):
        if not (philox.is_integer(value) and value >= low) and not (name == "batch_size" and value is None):
            raise ValueError(f"{name}: got {value!r}, needs an integer >= {low}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, needs a floating type")
    philox.check_seed(seed)
    if first_sample > philox.SAMPLE_LIMIT - n:
        raise ValueError(f"first_sample: got {first_sample}, needs 0..2^56 - n")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: got {guidance}, needs a finite number")
    if guidance != 1.0 and context is None:
        raise ValueError(f"guidance: got {guidance} without a context, needs a context to guide towards")
    table = make_table(schedule, solver, steps, **table_options)
    shape = sample_shape(model)
    anchor = next(model.parameters(), torch.empty(0))
    device = anchor.device
    contexts = _contexts(context, n, device)
    if batch_size is None:
        batch_size = chunk_size(shape)
    state_dtype = torch.promote_types(dtype, torch.float32)
    draw = PhiloxNoise(seed, state_dtype) if noise is None else _checked(noise, state_dtype)

    with evaluating(model):
        run = choose(engine, device, dtype, own_noise=noise is not None)(model, schedule.timesteps, table, dtype)
        chunks, start = [], 0
        while start < n:
            stop = min(start + batch_size, n)
            samples = torch.arange(first_sample + start, first_sample + stop, device=device)
            c = None if contexts is None else contexts[start:stop]
            try:
                x = draw(samples, 0, philox.Stream.INITIAL, shape)
                chunks.append(run(x, samples, c, guidance, draw, callback).to(torch.float32))
            except (MemoryError, RuntimeError) as error:
                if stop - start == 1 or not _out_of_memory(error):
                    raise
                batch_size = (stop - start) // 2
                logger.info("out of memory with %d samples at a time: going on with %d", stop - start, batch_size)
                continue
            start = stop
    return torch.cat(chunks)
