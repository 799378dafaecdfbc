"""solver_step: one step of any sampler, as one row of numbers.

    m     = m_uncond + guidance (m_cond - m_uncond)                 (Ho & Salimans 2022, with w = guidance)
    x0    = c0 x + c1 m ;  clamp to [-clip, clip] if clip is set
    x_new = c2 x + c3 x0 + c4 m + c5 x0_previous + c6 z             x0_previous <- x0

with z from stream 1 at step t. A table row is (c0, .., c6, t); see ddpm/solvers.py for the rows of each sampler.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import backend, native, philox
from kernels.backend import FLOATS, Cost, jit, tl
from kernels.items import COUNTS, Items, access, launch_items, place
from kernels.philox import Stream, tl_item_normals

SOURCE = native.source_of("solver_step")
COLUMNS = 8
FLOAT32_MAX = torch.finfo(torch.float32).max


def guide(m: Tensor, m_uncond: Tensor | None, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance; m itself where there is no unconditional output."""
    return m if m_uncond is None else m_uncond + guidance * (m - m_uncond)


def reference(
    x: Tensor, m: Tensor, c: Sequence[float | Tensor], z: Tensor | None, x0_previous: Tensor | None, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The equation above, out of place: (x_new, x0). c: the row's seven coefficients; z or x0_previous None = 0."""
    x0 = c[0] * x + c[1] * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    x_new = c[2] * x + c[3] * x0 + c[4] * m
    if x0_previous is not None:
        x_new = x_new + c[5] * x0_previous
    if z is not None:
        x_new = x_new + c[6] * z
    return x_new, x0


@jit(do_not_specialize=(*COUNTS, "count"))
def solver_step_kernel(
    x,
    m,
    m_uncond,
    x0_prev,
    table,
    index,
    seed,
    samples,
    guidance,
    total,
    per_row,
    magic,
    shift,
    numel,
    HW,
    C,
    clip,
    count,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    RUN: tl.constexpr,
    LAYOUT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    spot = place(total, per_row, magic, shift, BLOCK, LANES, REPEAT, LAYOUT)
    live, row, shape = spot[0], spot[1], (numel, HW, C)
    entry = tl.load(index)
    c = table + entry * 8
    c0, c1, c2, c3, c4 = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4)
    c5, c6 = tl.load(c + 5), tl.load(c + 6)
    if m_uncond is not None:
        # No stride of 0 or 1 at run time: with it, 3% more instructions (fp32, sm_80 to sm_100).
        if WEIGHTS == 2:
            w = tl.load(guidance + entry * count + row, mask=live, other=1.0)[:, None]
        else:
            w = tl.load(guidance + entry) if WEIGHTS == 1 else tl.load(guidance)
    # Unclipped, the equation is linear in x and m: multiplied out, it takes three instructions less per element.
    of_x, of_m = c2 + c3 * c0, c4 + c3 * c1
    # All loads stand before the first store: the tensors may alias for all the compiler knows.
    states, cleans = (), ()
    for j in tl.static_range(REPEAT):
        offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
        old = tl.load(x + offsets, mask=mask).to(tl.float32)
        output = tl.load(m + offsets, mask=mask).to(tl.float32)
        if m_uncond is not None:
            uncond = tl.load(m_uncond + offsets, mask=mask).to(tl.float32)
            output = uncond + w * (output - uncond)
        x0 = c0 * old + c1 * output
        if CLIPPED:
            x0 = tl.minimum(tl.maximum(x0, -clip), clip)
            new = c2 * old + c3 * x0 + c4 * output
        else:
            new = of_x * old + of_m * output
        if x0_prev is not None:
            new += c5 * tl.load(x0_prev + offsets, mask=mask).to(tl.float32)
        states, cleans = states + (new,), cleans + (x0,)
    if x0_prev is not None:
        for j in tl.static_range(REPEAT):
            offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
            tl.store(x0_prev + offsets, cleans[j].to(x0_prev.dtype.element_ty), mask=mask)
    # A branch that all programs take alike: solvers without noise pay no Philox.
    if c6 != 0.0:
        key, step = tl.load(seed), tl.load(c + 7).to(tl.int32)
        sample = tl.load(samples + row, mask=live, other=0)
        for j in tl.static_range(REPEAT):
            offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
            new = states[j] + c6 * tl_item_normals(key, step, sample, STREAM, spot, j, HW, LANES, REPEAT, RUN, LAYOUT)
            tl.store(x + offsets, new.to(x.dtype.element_ty), mask=mask)
    else:
        for j in tl.static_range(REPEAT):
            offsets, mask = access(spot, j, shape, LANES, REPEAT, RUN, LAYOUT)
            tl.store(x + offsets, states[j].to(x.dtype.element_ty), mask=mask)


def launch(x, m, table, index, seed, samples, m_uncond, guidance, x0_prev, clip) -> None:
    """One pass over x and what goes with it, in x's memory layout (others are brought to it)."""
    m, m_uncond = (None if tensor is None else backend.like(tensor, x) for tensor in (m, m_uncond))
    tensors = (x, m, m_uncond, x0_prev, table, index, seed, backend.vector(samples), guidance)
    launch_items(
        solver_step_kernel,
        Items.of(x, x, x0_prev),
        *tensors,
        more=(0.0 if clip is None else clip, x.shape[0]),
        STREAM=int(Stream.SAMPLING),
        WEIGHTS=0 if guidance is None else guidance.ndim,
        CLIPPED=clip is not None,
    )


def native_call(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    index: Tensor,
    seed: Tensor,
    samples: Tensor,
    m_uncond: Tensor | None,
    guidance: Tensor | None,
    x0_prev: Tensor | None,
    clip: float | None,
) -> list[int]:
    """The call of native/solver_step.h: float32 tensors in the layout of x, int64 index, seed and samples."""
    n = len(x)
    by_row, by_sample = ((0, 0), (1, 0), (n, 1))[0 if guidance is None else guidance.ndim]
    tensors = (x, m, m_uncond, x0_prev, table, index, seed, samples, guidance)
    return backend.fields(*tensors, by_row, by_sample, float(clip or 0), *backend.extent(x))


def _on_cpu(x: Tensor, m: Tensor, table: Tensor, index: Tensor, seed: Tensor, samples: Tensor, *others: Any) -> None:
    m_uncond, guidance, x0_prev, clip = others
    if backend.runs_native(SOURCE, x, m, m_uncond, x0_prev, table):
        m, m_uncond = (None if tensor is None else backend.like(tensor, x) for tensor in (m, m_uncond))
        samples = backend.vector(samples)
        call = native_call(x, m, table, index, seed, samples, m_uncond, guidance, x0_prev, clip)
        backend.launch_native(SOURCE, call, x.numel())
        return
    entry, compute = int(index), backend.computed_in(x.dtype)
    row = table[entry].to(compute)
    z = None
    if row[6] != 0:  # as in the kernel: a step of 32 3x16x16 images takes 1.4 ms with noise, 0.2 without (EPYC)
        step = row[7].to(torch.int64)
        z = philox.normal(seed, samples, step, Stream.SAMPLING, tuple(x.shape[1:]), device=x.device, dtype=compute)
    previous = None if x0_prev is None else x0_prev.to(compute)
    guided = m.to(compute)
    if m_uncond is not None:
        weight = guidance[entry] if guidance.ndim else guidance
        weight = weight.reshape(*weight.shape, *(1,) * (x.ndim - 1)) if weight.ndim else weight
        guided = guide(guided, m_uncond.to(compute), weight.to(compute))
    x_new, x0 = reference(x.to(compute), guided, row[:7].unbind(), z, previous, clip)
    x.copy_(x_new)
    if x0_prev is not None:
        x0_prev.copy_(x0)


def _check_values(x: Tensor, m: Tensor, table: Tensor, index: Tensor, *others: object) -> None:
    backend.check_range("index", index, 0, table.shape[0] - 1)


# index and seed (int64) are scalars, guidance (float32, with m_uncond) one too, [S] or [S, n].
SCHEMA = "(Tensor(a!) x, Tensor m, Tensor table, Tensor index, Tensor seed, Tensor samples, Tensor? m_uncond, "
SCHEMA += "Tensor? guidance, Tensor(b!)? x0_prev, float? clip) -> ()"
operator = backend.register("solver_step", launch, _on_cpu, lambda *_: None, _check_values, signature=SCHEMA)


def _weights(guidance: float | Tensor, table: Tensor, n: int) -> Tensor:
    """float32 [], [S] or [S, n] on the table's device."""
    if not isinstance(guidance, Tensor | int | float):
        raise TypeError(f"guidance: got {guidance!r}, needs a number or a tensor of them")
    if not isinstance(guidance, Tensor) and not abs(guidance) <= FLOAT32_MAX:
        raise ValueError(f"guidance: got {guidance!r}, needs a finite number in float32")
    if not isinstance(guidance, Tensor) or guidance.numel() == 1:
        return backend.scalar("guidance", guidance, torch.float32, table.device)
    rows = table.shape[0]
    if guidance.shape not in ((rows,), (rows, n)) or not guidance.is_floating_point():
        found = f"{guidance.dtype} {list(guidance.shape)}"
        needs = f"a number or a floating [{rows}] or [{rows}, {n}], one weight for each row, or row and sample"
        raise ValueError(f"guidance: got {found}, needs {needs}")
    backend.same_device(table, guidance=guidance)
    return guidance.to(torch.float32).contiguous()


def solver_step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    index: int | Tensor,
    seed: int | Tensor,
    samples: Tensor,
    m_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    x0_prev: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Advance x by one row of a StepTable, in place.

    Args:
        x: floating [n, ...], overwritten with the next state; contiguous or channels_last.
        m: the network's (conditional) output, of x's shape.
        table: float32 [S, 8], see `StepTable.rows`.
        index: the row in 0..S-1, or an int64 tensor of one element (its value is checked where `q_sample`'s t is).
        seed, samples: of the noise contract; samples int64 [n].
        m_uncond, guidance: the unconditional output and the guidance weight w: a number, a tensor of one element, or
            [S], one weight for each row of the table, or [S, n], for each row and sample; none without m_uncond.
        x0_prev: of x's shape and strides; read as the previous x0 and overwritten with this one. None for solvers
            without memory.
        clip: bound of x0, or None.

    Returns: x.
    """
    backend.check_tensors({"m_uncond": m_uncond, "x0_prev": x0_prev}, x=x, m=m, table=table, samples=samples)
    backend.check_floats("x", x, x.ndim > 1, "a floating tensor [n, ...]")
    for name, other in (("m", m), ("m_uncond", m_uncond), ("x0_prev", x0_prev)):
        if other is not None and (other.shape != x.shape or other.dtype not in FLOATS):
            needs = f"a floating tensor of x's shape {list(x.shape)}"
            raise ValueError(f"{name}: got {other.dtype} {list(other.shape)}, needs {needs}")
    backend.check_layout("x", x)
    if x0_prev is not None and x0_prev.stride() != x.stride():
        raise ValueError(f"x0_prev: has strides {x0_prev.stride()}, needs those of x {x.stride()}")
    if table.ndim != 2 or table.shape[1] != COLUMNS or table.dtype not in (torch.float32, torch.float64):
        needs = f"float32 [S, {COLUMNS}]: seven coefficients and t"
        raise ValueError(f"table: got {table.dtype} {list(table.shape)}, needs {needs}")
    if table.is_cuda and table.dtype != torch.float32:
        raise TypeError(f"table: got {table.dtype} on CUDA, needs float32 there")
    if not table.is_contiguous():
        raise ValueError(f"table: has strides {table.stride()}, needs a contiguous tensor")
    philox.check_samples(samples, x.shape[0], "x")
    backend.same_device(x, m=m, table=table, samples=samples, m_uncond=m_uncond, x0_prev=x0_prev)
    seed = philox.seed_tensor(seed, x.device)
    philox.check_integer("index", index, table.shape[0])
    if clip is not None and not (isinstance(clip, int | float) and 0 < clip <= FLOAT32_MAX):
        raise ValueError(f"clip: got {clip!r}, needs a bound > 0 in float32, or None")
    index = backend.scalar("index", index, torch.int64, x.device)
    weight = None if m_uncond is None else _weights(guidance, table, x.shape[0])
    operator(x, m, table, index, seed, samples, m_uncond, weight, x0_prev, clip)
    return x


def cost(x: torch.dtype, m: torch.dtype, guided: bool = False, memory: bool = False, noise: bool = True) -> Cost:
    """x read and written, m read (twice if guided), x0_prev read and written; the equation's operations, the normal."""
    moved = 2 * x.itemsize + m.itemsize * (2 if guided else 1) + (2 * x.itemsize if memory else 0)
    flops = 8 + (3 if guided else 0) + (2 if memory else 0) + (2 + philox.NORMAL_FLOPS if noise else 0)
    return Cost(bytes=moved, flops=flops)
