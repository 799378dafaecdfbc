"""Conditions and guidance inside the ONNX graphs."""

import numpy as np
import torch
from torch import nn

from ddpm.networks.protocol import condition_shape, null_condition
from ddpm.table import StepTable
from export.graph import BOOL, INT64, Builder
from export.traced import Traced


def null_of(model: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """ "No condition", float32 [*shape]."""
    return null_condition(model, torch.zeros(1, *shape))[0].float().numpy()


def rows(b: Builder, traced: Traced, conditions: str, leading: str) -> list[str]:
    """What the network reads of conditions [copies * batch, ...], each [copies, batch, ...]; leading: those two."""
    results = b.inline(traced.rows.graph, [conditions], "condition.")
    return [b.op("Reshape", row, b.op("Concat", leading, b.op("Shape", row, start=2), axis=0)) for row in results]


def halves(
    b: Builder, model: nn.Module, traced: Traced, context: str, guidance: str, negative: str | None
) -> list[str]:
    """Rows of context [batch, ...] and, only where guidance is not 1, of no condition: each [copies, batch, ...].

    negative: conditions [batch, ...] in place of none; guidance is [batch] with it.
    """
    shape, zero = condition_shape(model), b.integers(0)
    guided = b.op("Cast", b.op("Not", b.op("Equal", guidance, b.constant(1.0, np.float32))), to=INT64)
    guided = guided if negative is None else b.op("ReduceMax", guided, keepdims=0)
    copies = b.op("Reshape", b.op("Add", guided, b.constant(1, np.int64)), b.integers(1))
    nothing = negative
    if nothing is None:
        nothing = b.op("Expand", b.constant(null_of(model, shape)[None], np.float32), b.op("Shape", context))
    batch = b.op("Shape", context, start=0, end=1)
    both = b.op("Concat", context, nothing, axis=0)
    used = b.op("Slice", both, zero, b.op("Mul", copies, batch), zero)
    return rows(b, traced, used, b.op("Concat", copies, batch, axis=0))


def weights(b: Builder, table: StepTable, guidance: str, rank: int = 0) -> str | None:
    """w of every row [steps, ...], 1 + scale (w - 1); None where it is w in all of them. rank: of guidance."""
    if bool((table.guidance_scale == 1).all()):
        return None
    scales = table.guidance_scale.numpy().reshape(-1, *(1,) * rank)
    scale, one = b.constant(scales, np.float32), b.constant(1.0, np.float32)
    return b.op("Add", one, b.op("Mul", scale, b.op("Sub", guidance, one)))


def one_each(b: Builder, guidance: str, batch: str, rank: int) -> str:
    """Weights [batch] as [batch, 1, ...] of this rank; of another batch they are an error of the Reshape."""
    return b.op("Reshape", guidance, b.op("Concat", batch, b.integers(*(1,) * (rank - 1)), axis=0), allowzero=1)


def guided(b: Builder, m: str, guidance: str, x: str, phi: str | None = None) -> str:
    """m_uncond + guidance (m_cond - m_uncond); with one copy both are the same rows and m stays as it is.

    phi: of `kernels.guidance_rescale`, which follows.
    """
    copies = b.op("Reshape", m, b.op("Concat", b.integers(-1), b.op("Shape", x), axis=0))
    conditional, unconditional = (b.op("Gather", copies, b.constant(k, np.int64), axis=0) for k in (0, -1))
    guided = b.op("Add", unconditional, b.op("Mul", guidance, b.op("Sub", conditional, unconditional)))
    if phi is None:
        return guided
    axes, variances = b.integers(-3, -2, -1), []
    for value in (conditional, guided):
        apart = b.op("Sub", value, b.op("ReduceMean", value, axes))
        variances.append(b.op("ReduceMean", b.op("Mul", apart, apart), axes))
    own, spread = variances
    one, flat = b.constant(1.0, np.float32), b.op("Not", b.op("Greater", spread, b.constant(0.0, np.float32)))
    ratio = b.op("Where", flat, one, b.op("Sqrt", b.op("Div", own, b.op("Where", flat, one, spread))))
    return b.op("Mul", guided, b.op("Add", b.op("Mul", phi, ratio), b.op("Sub", one, phi)))


def finite(b: Builder, guidance: str, **others: str) -> str:
    """guidance, if it and the other values are finite, or an error. With more than a context it is [batch]."""
    zero = b.constant(0.0, np.float32)
    sums = [b.op("ReduceSum", b.op("Mul", value, zero), keepdims=0) for value in others.values()]
    wrong = b.op("Not", b.op("Equal", b.sum_of(*sums, b.op("Mul", guidance, zero)), zero))
    if len(others) > 1:
        wrong = b.op("Cast", b.op("ReduceMax", b.op("Cast", wrong, to=INT64), keepdims=0), to=BOOL)
    return b.refused(guidance, wrong, f"guidance, {', '.join(others)}: need finite numbers", np.float32)
