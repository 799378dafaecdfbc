"""Flops and bytes of one operator call, from its shapes.

flops = 2 per multiply-accumulate of a convolution or matrix product; of the rest one per output element, the
convention of torch.profiler for add and mul, 0 where only data moves. bytes = every input read once and the output
written once: what must move, whatever a cache keeps. Operators that are not here have no count, and say so.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Dims = Sequence[Any]

ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "unsigned char": 1,
    "signed char": 1,
    "bool": 1,
}
ARITHMETIC = re.compile(
    r"(add|sub|rsub|mul|div|clamp|gelu|relu|sigmoid|silu|tanh|sqrt|log|exp|pow|cos|sin|neg|addcmul|lerp|where|remainder|"
    r"floor_divide|eq|ne|lt|le|gt|ge|(__|bitwise_)(and|or|xor|rshift|lshift|right_shift|left_shift)(__)?)_?"
)
# No bytes move: shapes only.
FREE = re.compile(
    r"view|reshape|unsqueeze|squeeze|expand|chunk|split|unbind|select|slice|permute|transpose|t|empty|empty_like|detach_?|"
    r"alias|as_strided|flatten|unflatten|lift_fresh"
)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written, of one call."""

    flops: float
    bytes: float


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.strip("[]() ").split(",") if number.strip()]


def _broadcast(shapes: Sequence[Dims]) -> int:
    """Elements of the shapes broadcast together."""
    longest = max((len(shape) for shape in shapes), default=0)
    padded = [[1] * (longest - len(shape)) + list(shape) for shape in shapes]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True)) if longest else 1


def _convolution(x: Dims, weight: Dims, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, int]:
    """(flops, output elements) of x [n, ci, *size] with weight [co, ci/groups, *kernel]."""
    kernel = weight[2:]
    one = [1] * len(kernel)
    out = [
        (size + 2 * pad - spread * (k - 1) - 1) // step + 1
        for size, pad, spread, k, step in zip(
            x[2:], padding or [0 for _ in one], dilation or one, kernel, stride or one, strict=True
        )
    ]
    outputs = x[0] * weight[0] * math.prod(out)
    return 2 * outputs * weight[1] * math.prod(kernel), outputs


def _matrix(name: str, dims: Dims) -> tuple[int, int] | None:
    """(flops, output elements) of a matrix product."""
    if name == "linear":
        rows = math.prod(dims[0][:-1])
        inner, columns = dims[1][1], dims[1][0]
    elif name in ("mm", "addmm", "addmm_"):
        left, right = dims[:2] if name == "mm" else dims[1:3]
        rows, inner, columns = left[0], left[1], right[1]
    elif name in ("bmm", "matmul") and all(len(shape) >= 2 for shape in dims[:2]):
        rows, inner, columns = math.prod(dims[0][:-1]), dims[0][-1], dims[1][-1]
    else:
        return None
    return 2 * rows * inner * columns, rows * columns


def _winograd(x: Sequence[int], weights: Sequence[Sequence[int]]) -> Work:
    """The products that are computed, a quarter of the direct sums'; x read, the weights read, the result written."""
    n, _, height, width = x
    tiles = n * -(-height // 4) * -(-width // 4)
    numbers = sum(math.prod(weight) for weight in weights)
    outputs = n * height * width * weights[-1][0] * weights[-1][3]
    return Work(float(2 * tiles * numbers), 4.0 * (math.prod(x) + numbers + outputs))


def work_of(name: str, dims: Dims, types: Sequence[str], concrete: Sequence[str]) -> Work | None:
    """Flops and bytes of a call of PyTorch's as the profiler recorded it, or None for an operator not counted here.

    dims, types, concrete: the trace's "Input Dims", "Input type" and "Concrete Inputs", one entry per argument.
    """
    if name == "fused_ddpm::winograd":
        return _winograd(*dims[:2])
    space, _, short = name.partition("::")
    packed, added = short == "_convolution_pointwise", short == "_convolution_pointwise_"
    packed = space == "mkldnn" and (packed or added)
    if not dims or not (space == "aten" or packed):
        return None
    if FREE.fullmatch(short):
        return Work(0, 0)
    item = next((ITEM_BYTES[kind] for kind in types if kind in ITEM_BYTES), None)
    tensors = [(shape, ITEM_BYTES[kind]) for shape, kind in zip(dims, types, strict=True) if kind in ITEM_BYTES]
    read = sum(math.prod(shape) * size for shape, size in tensors)
    # Compiled code calls `convolution`, whose seventh argument says whether it is transposed: that one is not counted.
    if packed:
        # In place, the first argument is what the result is added to: read and written.
        x, weight = dims[added : added + 2]
        padding, stride, dilation = (_numbers(text) for text in concrete[3 + added : 6 + added])
        flops, outputs = _convolution(x, weight, stride, padding, dilation)
        moved = math.prod(x) + math.prod(weight) + weight[0] + (1 + added) * outputs
        return Work(float(flops), float(moved * (item or 0)))
    forward = short == "conv2d" or (short == "convolution" and concrete[6] == "False")
    if forward and all(text.startswith("[") for text in concrete[3:6]):  # padding may be "same"
        stride, padding, dilation = (_numbers(text) for text in concrete[3:6])
        flops, outputs = _convolution(dims[0], dims[1], stride, padding, dilation)
    elif short == "conv_transpose2d":
        x, weight = dims[0], dims[1]
        stride, padding = (_numbers(text) for text in concrete[3:5])
        flops = 2 * math.prod(x) * weight[1] * math.prod(weight[2:])
        sizes = [
            (size - 1) * step - 2 * pad + k
            for size, step, pad, k in zip(x[2:], stride, padding, weight[2:], strict=True)
        ]
        outputs = x[0] * weight[1] * math.prod(sizes)
    elif short in ("max_pool2d", "avg_pool2d"):
        kernel = _numbers(concrete[1])
        flops = math.prod(dims[0])
        outputs = flops // math.prod(kernel)
    elif (product := _matrix(short, dims)) is not None:
        flops, outputs = product
    elif short in ("cat", "stack"):
        item = 4 if item is None else item
        flops, outputs = 0, sum(math.prod(shape) for shape in dims[0])
        read = outputs * item
    elif short in ("batch_norm", "group_norm", "layer_norm"):
        flops = outputs = math.prod(dims[0])
    elif ARITHMETIC.fullmatch(short) and tensors:
        flops = outputs = _broadcast([shape for shape, _ in tensors])
    elif short in ("copy_", "clone", "contiguous") and tensors:
        flops, outputs = 0, math.prod(dims[0])
        read = outputs * (tensors[-1][1])
    elif short in ("zeros_like", "ones_like") and tensors:
        flops, outputs, read = 0, math.prod(dims[0]), 0
    elif short in ("max", "min") and len(tensors) == 1:
        flops, outputs = math.prod(dims[0]), 1
    else:
        return None
    return Work(float(flops), float(read + outputs * (item or 0)))
