"""solver_step: one step of any sampler, as one row of numbers.

    m     = m_uncond + guidance (m_cond - m_uncond)                 (Ho & Salimans 2022, with w = guidance)
    x0    = c0 x + c1 m ;  clamp to [-clip, clip] if clip is set
    x_new = c2 x + c3 x0 + c4 m + c5 x0_previous + c6 z             x0_previous <- x0

with z from stream 1 at step t. A table row is (c0, .., c6, t); see ddpm/solvers.py for the rows of each sampler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import philox

COLUMNS = 8


def guide(m: Tensor, m_uncond: Tensor | None, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance; m itself where there is no unconditional output."""
    return m if m_uncond is None else m_uncond + guidance * (m - m_uncond)


def reference(
    x: Tensor,
    m: Tensor,
    c: Sequence[float | Tensor],
    z: Tensor | None,
    x0_previous: Tensor | None,
    clip: float | None,
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


def _check(
    x: Tensor, m: Tensor, table: Tensor, samples: Tensor, m_uncond: Tensor | None, x0_prev: Tensor | None
) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype} {list(x.shape)}, needs a floating tensor [n, ...]")
    for name, other in (("m", m), ("m_uncond", m_uncond), ("x0_prev", x0_prev)):
        if other is not None and (other.shape != x.shape or not other.is_floating_point()):
            raise ValueError(
                f"{name}: got {other.dtype} {list(other.shape)}, needs a floating tensor of x's shape {list(x.shape)}"
            )
    if table.ndim != 2 or table.shape[1] != COLUMNS or not table.is_floating_point():
        raise ValueError(
            f"table: got {table.dtype} {list(table.shape)}, needs float32 [S, {COLUMNS}]: seven coefficients and t"
        )
    if samples.shape != (x.shape[0],):
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{x.shape[0]}], one index per row of x")


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
        x: floating [n, ...], overwritten with the next state.
        m: the network's (conditional) output, like x.
        table: float32 [S, 8], see `StepTable.rows`.
        index: the row, an int in 0..S-1 or a one-element int64 tensor.
        seed, samples: of the noise contract; samples int64 [n].
        m_uncond, guidance: the unconditional output and the guidance weight w; no guidance without m_uncond.
        x0_prev: like x; read as the previous x0 and overwritten with this one. None for solvers without memory.
        clip: bound of x0, or None.

    Returns: x. Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    _check(x, m, table, samples, m_uncond, x0_prev)
    if not isinstance(index, Tensor) and not 0 <= index < table.shape[0]:
        raise ValueError(f"index: got {index}, needs 0..{table.shape[0] - 1}")
    compute = torch.promote_types(x.dtype, torch.float32)
    row = table[index].reshape(COLUMNS).to(compute)
    step = row[7].to(torch.int64)
    z = philox.normal(seed, samples, step, philox.Stream.SAMPLING, x.shape[1:], device=x.device, dtype=compute)
    previous = None if x0_prev is None else x0_prev.to(compute)
    guided = guide(m.to(compute), None if m_uncond is None else m_uncond.to(compute), guidance)
    x_new, x0 = reference(x.to(compute), guided, row[:7].unbind(), z, previous, clip)
    x.copy_(x_new)
    if x0_prev is not None:
        x0_prev.copy_(x0)
    return x
