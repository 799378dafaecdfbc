"""guidance_rescale: classifier-free guidance whose result keeps the spread of the conditional output.

    g   = m_uncond + w (m_cond - m_uncond)
    out = phi g std(m_cond) / std(g) + (1 - phi) g          std over the elements of one sample; where std(g) = 0, g

(Lin et al. 2024, equations 15 and 16.) Inference only: no autograd. What `solver_step` then gets is m without m_uncond.

One program is one sample: a sample of more than TILE elements is read twice, and few large ones leave most of a card
idle, beside a network that is hundreds of times as much work.
"""

import torch
from torch import Tensor

from kernels import backend, native
from kernels.backend import FLOATS, Cost, jit, power_of_two, tl
from kernels.solver_step import FLOAT32_MAX, guide

SOURCE = native.source_of("guidance_rescale")
ELEMENTS_LIMIT = 1 << 31  # offsets within a sample are 32 bit, those of samples 64 bit
TILE = 4096  # elements of both outputs that a program holds in registers, at 16 a thread up to 8 warps. Untuned.
THREAD_ELEMENTS = 16


def reference(m: Tensor, m_uncond: Tensor, guidance: float | Tensor, rescale: float | Tensor) -> Tensor:
    """The equations above on [n, ...]; guidance: a number, or [n, 1, ...]."""
    guided, dims = guide(m, m_uncond, guidance), tuple(range(1, m.ndim))
    own, spread = (tensor.std(dims, correction=0, keepdim=True) for tensor in (m, guided))
    return guided * (rescale * torch.where(spread > 0, own / spread, 1.0) + (1 - rescale))


@jit
def tile_of(m, m_uncond, start, i, w, NUMEL, BLOCK):
    """The i-th tile of a sample: (m, guided, which elements exist), each [BLOCK]."""
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < NUMEL
    cond = tl.load(m + start + offsets, mask=exists, other=0).to(tl.float32)
    uncond = tl.load(m_uncond + start + offsets, mask=exists, other=0).to(tl.float32)
    return cond, uncond + w * (cond - uncond), exists


@jit
def merged(mean, squares, before, value, exists, here):
    """Mean and sum of squares around it of `before` elements and of these `here` (Chan, Golub & LeVeque 1983)."""
    part = tl.sum(value, 0) / here
    apart = tl.where(exists, value - part, 0.0)
    share = here / (before + here)
    squares += tl.sum(apart * apart, 0) + (part - mean) * (part - mean) * before * share
    return mean + (part - mean) * share, squares


@jit
def guidance_rescale_kernel(
    m,
    m_uncond,
    guidance,
    rescale,
    out,
    NUMEL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * NUMEL
    w = tl.load(guidance + row) if BY_SAMPLE else tl.load(guidance)
    phi = tl.load(rescale)
    cond, guided, exists = tile_of(m, m_uncond, start, 0, w, NUMEL, BLOCK)
    here = min(NUMEL, BLOCK) * 1.0
    mean, squares = merged(0.0, 0.0, 0.0, cond, exists, here)
    mean_guided, squares_guided = merged(0.0, 0.0, 0.0, guided, exists, here)
    for i in range(1, TILES):
        more, more_guided, there = tile_of(m, m_uncond, start, i, w, NUMEL, BLOCK)
        before, here = i * BLOCK * 1.0, tl.minimum(NUMEL - i * BLOCK, BLOCK) * 1.0
        mean, squares = merged(mean, squares, before, more, there, here)
        mean_guided, squares_guided = merged(mean_guided, squares_guided, before, more_guided, there, here)
    spreads = squares_guided > 0.0
    ratio = tl.where(spreads, tl.sqrt(squares / tl.where(spreads, squares_guided, 1.0)), 1.0)
    factor = phi * ratio + (1.0 - phi)
    for i in range(TILES):
        if TILES > 1:
            _, guided, exists = tile_of(m, m_uncond, start, i, w, NUMEL, BLOCK)
        tl.store(out + start + i * BLOCK + tl.arange(0, BLOCK), guided * factor, mask=exists)


def launch(m: Tensor, m_uncond: Tensor, guidance: Tensor, rescale: Tensor) -> Tensor:
    """One pass over both outputs, two where a sample exceeds a tile; in m's memory layout."""
    out = torch.empty_like(m, dtype=torch.float32)
    numel = m[0].numel() if len(m) else 0
    block = min(power_of_two(max(numel, 1)), TILE)
    backend.launch(
        guidance_rescale_kernel,
        (m.shape[0] if numel else 0,),
        m,
        backend.like(m_uncond, m),
        guidance,
        rescale,
        out,
        NUMEL=numel,
        TILES=-(-numel // block),
        BLOCK=block,
        BY_SAMPLE=guidance.ndim == 1,
        num_warps=min(max(block // (THREAD_ELEMENTS * backend.WARP), 1), 8),
    )
    return out


def native_call(m: Tensor, m_uncond: Tensor, guidance: Tensor, rescale: Tensor, out: Tensor) -> list[int]:
    """The call of native/guidance_rescale.h: float32 tensors in one layout."""
    return backend.fields(m, m_uncond, guidance, guidance.ndim, rescale, out, len(m), m[0].numel())


def _on_cpu(m: Tensor, m_uncond: Tensor, guidance: Tensor, rescale: Tensor) -> Tensor:
    if backend.runs_native(SOURCE, m, m_uncond):
        out, m_uncond = torch.empty_like(m), backend.like(m_uncond, m)
        backend.launch_native(SOURCE, native_call(m, m_uncond, guidance, rescale, out), m.numel())
        return out
    compute = backend.computed_in(m.dtype)
    weights = guidance.to(compute)
    weights = weights.reshape(-1, *(1,) * (m.ndim - 1)) if weights.ndim else weights
    out = reference(m.to(compute), m_uncond.to(compute), weights, rescale.to(compute))
    return backend.like(out, m)


def _fake(m: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(m, dtype=backend.computed_in(m.dtype))


# guidance (float32) is a scalar or [n], rescale (float32) a scalar.
operator = backend.register("guidance_rescale", launch, _on_cpu, _fake, signature=_on_cpu)


def guidance_rescale(m: Tensor, m_uncond: Tensor, guidance: float | Tensor, rescale: float | Tensor) -> Tensor:
    """The network's output, guided and rescaled, for inference (not differentiable).

    Args:
        m, m_uncond: the conditional and the unconditional output, floating [n, ...]; m contiguous or channels_last.
        guidance: the weight w: a number, a tensor of one element, or float [n], one for each sample.
        rescale: phi, a number in 0..1 (0: guidance alone) or a tensor of one element.

    Returns: float32 (float64 for float64, on the CPU only) of m's shape and memory layout.
    """
    backend.check_tensors(m=m, m_uncond=m_uncond)
    backend.check_floats("m", m, m.ndim > 1, "a floating tensor [n, ...]")
    if m[:1].numel() >= ELEMENTS_LIMIT:
        raise ValueError(f"m: got {list(m.shape)}, needs fewer than 2^31 elements per sample")
    backend.check_layout("m", m)
    if m_uncond.shape != m.shape or m_uncond.dtype not in FLOATS:
        found = f"{m_uncond.dtype} {list(m_uncond.shape)}"
        raise ValueError(f"m_uncond: got {found}, needs a floating tensor of m's shape {list(m.shape)}")
    backend.same_device(m, m_uncond=m_uncond)
    for name, value, low, high in (("guidance", guidance, -FLOAT32_MAX, FLOAT32_MAX), ("rescale", rescale, 0, 1)):
        if not isinstance(value, Tensor | int | float):
            raise TypeError(f"{name}: got {value!r}, needs a number or a tensor")
        if not isinstance(value, Tensor) and not low <= value <= high:
            raise ValueError(f"{name}: got {value!r}, needs a number in {low:g}..{high:g}")
    if isinstance(guidance, Tensor) and guidance.shape == m.shape[:1] and guidance.is_floating_point():
        backend.same_device(m, guidance=guidance)
        weights = guidance.to(torch.float32).contiguous()
    elif isinstance(guidance, Tensor) and guidance.numel() != 1:
        found = f"{guidance.dtype} {list(guidance.shape)}"
        raise ValueError(f"guidance: got {found}, needs a number or a floating [{m.shape[0]}], one weight a sample")
    else:
        weights = backend.scalar("guidance", guidance, torch.float32, m.device)
    phi = backend.scalar("rescale", rescale, torch.float32, m.device)
    registered = backend.is_opaque(m) or backend.runs_native(SOURCE, m, m_uncond)
    return (operator if registered else _on_cpu)(m, m_uncond, weights, phi)


def cost(m: torch.dtype) -> Cost:
    """Both outputs read, float32 written; guidance (3), two means and variances (2 x 4), the product."""
    return Cost(bytes=2 * m.itemsize + 4, flops=12)
