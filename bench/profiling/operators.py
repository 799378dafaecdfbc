"""Flops and bytes of one operator call, from its shapes.

flops = 2 per multiply-accumulate of a convolution or matrix product; of the rest one per element of the largest tensor,
the convention of torch.profiler for add and mul, 0 where only data moves. bytes = every input read once and the output
written once: what must move, whatever a cache keeps. The output's shape is what PyTorch finds for tensors without data
(device meta). Operators of kernels/ cost what their files say. Those for which nobody knows, and those of other
packages, have no count, which is shown.
"""

import math
from ast import literal_eval
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bench.kernels import operator_file, times
from kernels.backend import Cost

TYPES = {"float": torch.float32, "double": torch.float64, "c10::Half": torch.float16, "c10::BFloat16": torch.bfloat16}
TYPES |= {"long int": torch.int64, "int": torch.int32, "unsigned char": torch.uint8, "bool": torch.bool}
PRODUCTS = ("mm", "addmm", "bmm", "matmul", "baddbmm")
ONLY_MOVE = (
    *("cat", "stack", "copy", "clone", "contiguous", "to", "repeat", "repeat_interleave", "index_select"),
    *("fill", "zero", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "arange"),
)
# Their first argument is written over, or only its shape is taken.
FRESH = ("copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")
LISTS = ("cat", "stack", "winograd")  # of the others that take a list of tensors the flops are not known
MAY_COPY = ("to", "contiguous")  # of what may share memory with an argument; the others are views


def _argument(shape: Sequence[Any], kind: str, text: str) -> Any:
    """An argument of a call as the profiler wrote it down; tensors without data, None where nothing is written."""
    if kind == "TensorList":
        return [torch.empty(one, device="meta") for one in shape]
    if kind in TYPES:
        return torch.empty(shape, dtype=TYPES[kind], device="meta")
    try:
        return literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return text


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and among those of their lists."""
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else (value,))]
    return [one for one in flat if isinstance(one, Tensor)]


def _own(name: str, arguments: Sequence[Any]) -> Cost | None:
    """Of an operator of kernels/: what its file says of an element; None for those that sampling does not call."""
    x, other, *more = arguments
    elements = x.numel()
    if name == "winograd":  # the products that are computed, a quarter of the direct sums'
        n, _, height, width = x.shape
        numbers = sum(weight.numel() for weight in other)
        outputs = n * height * width * other[-1].shape[0] * other[-1].shape[3]
        return Cost(4 * (elements + numbers + outputs), 2 * n * -(-height // 4) * -(-width // 4) * numbers)
    if name == "solver_step":
        given = (x.dtype, other.dtype, more[4] is not None, more[6] is not None)
    elif name == "group_norm_relu":
        given = (x.dtype,)
    elif name == "bottleneck":
        given = (x.dtype, x.shape[1], len(x))
    elif name == "convolution":  # what it does with its output is text, which is not recorded
        skipped = 0 if more[1] is None else more[1].shape[1]
        given = (x.dtype, x.shape[1] + skipped, len(other), math.prod(other.shape[2:]))
        elements = elements // x.shape[1] * len(other)
    else:
        return None
    return times(operator_file(name).cost(*given), elements)


def _run_without_data(name: str, arguments: Sequence[Any]) -> tuple[list[Tensor], bool]:
    """(results, whether they are views) of "space::name" for these arguments; no results where PyTorch takes none."""
    space, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, space), short, None)
    for overload in packet.overloads() if packet else ():
        schema = getattr(packet, overload)._schema
        if len(schema.arguments) != len(arguments):
            continue
        pairs = zip(schema.arguments, arguments, strict=True)
        asked = [(one, value) for one, value in pairs if value is not None or not one.has_default_value()]
        # Text is not recorded; where some must be given, it names what mkldnn does afterwards.
        given = {one.name: "none" if value is None and str(one.type) == "str" else value for one, value in asked}
        with suppress(Exception), torch.no_grad():  # whatever it raises for arguments of another overload
            alias = schema.returns[0].alias_info if schema.returns else None
            views = alias is not None and not alias.is_write
            return _tensors([getattr(packet, overload)(**given)]), views
    return [], False


def _flops(name: str, inputs: Sequence[Tensor], output: Tensor, transposed: bool) -> int:
    """Of an operator of aten or mkldnn, its name without a trailing underscore."""
    if "conv" in name:
        x, weight = [tensor for tensor in inputs if tensor.dim() > 2][-2:]
        return 2 * (x if transposed else output).numel() * math.prod(weight.shape[1:])
    if "linear" in name or name in PRODUCTS:
        left = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
        return 2 * output.numel() * left.shape[-1]
    if "scaled_dot_product" in name:
        return 4 * inputs[0].numel() * inputs[1].shape[-2]
    return 0 if name in ONLY_MOVE else max(tensor.numel() for tensor in (*inputs, output))


def work_of(name: str, dims: Sequence[Any], types: Sequence[str], concrete: Sequence[str]) -> Cost | None:
    """Of a call as the profiler recorded it, or None for an operator not counted here.

    dims, types, concrete: the trace's "Input Dims", "Input type" and "Concrete Inputs", one entry per argument.
    """
    space, _, short = name.partition("::")
    if space not in ("aten", "mkldnn", "fused_ddpm") or ("TensorList" in types and short not in LISTS):
        return None
    if short in EMPTY:
        return Cost(0, 0)
    arguments = [_argument(*written) for written in zip(dims, types, concrete, strict=True)]
    if space == "fused_ddpm":
        return _own(short, arguments) if arguments else None
    inputs, in_place = _tensors(arguments), short.endswith("_") and not short.endswith("__")
    # mkldnn's in place cannot be run without data.
    results, views = (inputs[:1], False) if in_place else _run_without_data(name, arguments)
    if not results:
        return None
    if views and (short not in MAY_COPY or results[0] is inputs[0]):
        return Cost(0, 0)
    if not in_place:
        inputs = [one for one in inputs if one is not results[0]]  # "out", which is only written
    transposed = "transpose" in short or (short == "convolution" and concrete[6] == "True")
    moved = sum(tensor.nbytes for tensor in (*inputs[short in FRESH :], *results))
    return Cost(moved, _flops(short.removesuffix("_"), inputs, results[0], transposed))
