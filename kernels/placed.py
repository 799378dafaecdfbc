"""placed: images on a larger canvas, zeros around them, or what lies within a smaller one.

Inference only. A plain function: in C++ for float32 on CPUs (see `backend.runs_native`), by PyTorch elsewhere.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native

SOURCE = native.source_of("placed")


def placed(x: Tensor, sides: Sequence[int], top: int, left: int) -> Tensor:
    """x [n, C, h, w] -> [n, C, *sides], whose pixel (top, left) is x's first; they may be negative, which crops.

    x itself if it has these sides. In C++ x is channels_last, as is the result; others go by PyTorch.
    """
    backend.check_tensors(x=x)
    if x.ndim != 4 or len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"x: got {list(x.shape)} for sides {list(sides)}, needs [n, C, h, w] and (height, width)")
    (n, channels, height, width), (down, across) = x.shape, sides
    if (height, width, top, left) == (down, across, 0, 0):
        return x
    if not x.is_contiguous(memory_format=torch.channels_last) or not backend.runs_native(SOURCE, x):
        return F.pad(x, (left, across - width - left, top, down - height - top))
    out = torch.empty(n, channels, down, across, dtype=x.dtype, memory_format=torch.channels_last)
    backend.launch_native(SOURCE, backend.fields(x, out, n, height, width, channels, down, across, top, left))
    return out
