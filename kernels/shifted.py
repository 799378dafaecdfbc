"""shifted: a shift of every channel, which copies of the same images have each of their own.

    out[k, n] = x[n] + shift[k, n]

Inference only. A plain function: in C++ for float32 on CPUs (see `backend.runs_native`), by PyTorch elsewhere.
"""

import torch
from torch import Tensor

from kernels import backend, native

SOURCE = native.source_of("shifted")


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x [n, C, h, w] plus shift [k, n, C] or [k, 1, C], all floating -> [k * n, C, h, w].

    In C++ x is channels_last, as is the result, and shift contiguous; others go by PyTorch.
    """
    backend.check_tensors(x=x, shift=shift)
    if x.ndim != 4 or shift.ndim != 3 or shift.shape[1] not in (1, len(x)) or shift.shape[2] != x.shape[1]:
        raise ValueError(f"shift: got {list(shift.shape)} for x {list(x.shape)}, needs [k, n or 1, C] for [n, C, h, w]")
    backend.same_device(x, shift=shift)
    laid = x.is_contiguous(memory_format=torch.channels_last) and shift.is_contiguous()
    if not laid or not backend.runs_native(SOURCE, x, shift):
        return (x + shift[..., None, None]).flatten(0, 1)
    (n, channels, height, width), copies = x.shape, len(shift)
    out = torch.empty(copies * n, channels, height, width, dtype=x.dtype, memory_format=torch.channels_last)
    backend.launch_native(SOURCE, backend.fields(x, shift, out, copies, n, height * width, channels, shift.shape[1]))
    return out
