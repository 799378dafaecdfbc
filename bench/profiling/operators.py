"""Flops and bytes of one operator call, from its shapes.

flops = 2 per multiply-accumulate of a convolution or matrix product; of the rest one per element of the largest tensor,
the convention of torch.profiler for add and mul, 0 where only data moves. bytes = every input read once and the output
written once: what must move, whatever a cache keeps. The output's shape is what PyTorch finds for tensors without data
(device meta). Operators for which it finds none, and those of other packages, have no count, which is shown.
"""

import math
from ast import literal_eval
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

Dims = Sequence[Any]

TYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "c10::Half": torch.float16,
    "c10::BFloat16": torch.bfloat16,
    "long int": torch.int64,
    "int": torch.int32,
    "short int": torch.int16,
    "unsigned char": torch.uint8,
    "signed char": torch.int8,
    "bool": torch.bool,
}
PRODUCTS = ("mm", "addmm", "bmm", "matmul", "baddbmm")
ONLY_MOVE = (
    *("cat", "stack", "copy", "clone", "contiguous", "to", "repeat", "repeat_interleave", "index_select"),
    *("fill", "zero", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "arange"),
)
# Their first argument is written over, or only its shape is taken.
FRESH = ("copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")
LISTS = ("cat", "stack")  # of the others that take a list of tensors the flops are not known
MAY_COPY = ("to", "contiguous")  # of what may share memory with an argument; the others are views


class Work(NamedTuple):
    """Floating-point operations, and bytes read and written, of one call."""

    flops: float
    bytes: float


def _argument(shape: Dims, kind: str, text: str) -> Any:
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


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _winograd(x: Sequence[int], weights: Sequence[Sequence[int]]) -> Work:
    """The products that are computed, a quarter of the direct sums'; x read, the weights read, the result written."""
    n, _, height, width = x
    tiles = n * -(-height // 4) * -(-width // 4)
    numbers = sum(math.prod(weight) for weight in weights)
    outputs = n * height * width * weights[-1][0] * weights[-1][3]
    return Work(float(2 * tiles * numbers), 4.0 * (math.prod(x) + numbers + outputs))


def _run_without_data(name: str, arguments: Sequence[Any]) -> tuple[list[Tensor], bool] | None:
    """(results, whether they are views) of "space::name" for these arguments; None where PyTorch takes no such call."""
    space, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, space), short, None)
    for overload in packet.overloads() if packet else ():
        schema = getattr(packet, overload)._schema
        if len(schema.arguments) != len(arguments):
            continue
        alias = schema.returns[0].alias_info if schema.returns else None
        if alias is not None and alias.is_write:  # in place; mkldnn's cannot be run without data
            return _tensors(arguments)[:1], False
        given = {}
        for one, value in zip(schema.arguments, arguments, strict=True):
            if value is not None or not one.has_default_value():
                # Text is not recorded; where some must be given, it names what mkldnn does afterwards.
                given[one.name] = "none" if value is None and str(one.type) == "str" else value
        with suppress(Exception), torch.no_grad():  # whatever it raises for arguments of another overload
            return _tensors([getattr(packet, overload)(**given)]), alias is not None
    return None


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


def work_of(name: str, dims: Dims, types: Sequence[str], concrete: Sequence[str]) -> Work | None:
    """Flops and bytes of a call of PyTorch's as the profiler recorded it, or None for an operator not counted here.

    dims, types, concrete: the trace's "Input Dims", "Input type" and "Concrete Inputs", one entry per argument.
    """
    if name == "fused_ddpm::winograd":
        return _winograd(*dims[:2])
    space, _, short = name.partition("::")
    if space not in ("aten", "mkldnn") or ("TensorList" in types and short not in LISTS):
        return None
    if short in EMPTY:
        return Work(0, 0)
    arguments = [_argument(*written) for written in zip(dims, types, concrete, strict=True)]
    found = _run_without_data(name, arguments)
    if found is None or not found[0]:
        return None
    (results, views), inputs = found, _tensors(arguments)
    if views and (short not in MAY_COPY or results[0] is inputs[0]):
        return Work(0, 0)
    transposed = "transpose" in short or (short == "convolution" and concrete[6] == "True")
    flops = _flops(short.removesuffix("_"), inputs, results[0], transposed)
    return Work(float(flops), float(_size(inputs[short in FRESH :]) + _size(results)))
