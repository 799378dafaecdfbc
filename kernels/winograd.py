"""winograd: a 3x3 convolution with a quarter of the multiplications, for CPUs.

    V = B^T d B         d: the 6x6 pixels around a tile of 4x4, of one channel; V: its 36 points
    U = G g G^T         g: the 3x3 weights from one channel to another
    Y = A^T M A         M[k] = sum_c U[k, c] * V[c], point by point: 36 products [tiles, C] x [C, K]
    out = GELU(Y + bias) + plus          each of the three optional; plus repeats under guidance

F(4x4, 3x3) of Winograd's minimal filtering (Lavin & Gray: Fast Algorithms for Convolutional Neural Networks, 2016,
equation 8), evaluated at 0, 1, -1, 1/2, -2 and infinity: A, B and G follow from the points by the construction of Cook
and Toom (Barabasz et al.: Error Analysis and Improving the Accuracy of Winograd Convolution, 2020, who find these
points). Inference only: no autograd. There is no Triton kernel: on a GPU the tensor cores are faster than the memory
that the transforms would need.

Does it pay? Two cores at 2.5 GHz with AVX-512, against oneDNN's convolution with GELU in weights of its own layout:

    64 to 64 channels, 16x16      batch 1: 0.08 ms instead of 0.24, batch 32: 1.9 instead of 3.9
    128 to 128, 8x8               batch 1: 0.10 instead of 0.25, batch 32: 1.6 instead of 3.8
    512 to 512, 8x8               batch 2: 2.6 instead of 3.8, batch 16: 17 instead of 30

With AVX2 alone about as much. It rounds more: the root mean square error is 1.6 times that of the direct sum (4.6e-7
against 2.9e-7 for normal inputs and 64 channels; the largest are 5.5e-6 and 5.0e-6). Points 0, 1, -1, 2, -2 have half
as much again. A pixel that is no finite number makes its tile, and tiles beside it, NaN.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native
from kernels.backend import Cost

SOURCE = Path(__file__).with_suffix(".cpp")
TILE, SIDE = 4, 6
PANEL = 32  # output channels that winograd.cpp computes at once

B_T = [
    [1, -1.5, -2, 1.5, 1, 0],
    [0, -1, 0.5, 2.5, 1, 0],
    [0, 1, -2.5, 0.5, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 0.5, -1, -0.5, 1, 0],
    [0, 1, -1.5, -2, 1.5, 1],
]
G = [
    [1, 0, 0],
    [1 / 3, 1 / 3, 1 / 3],
    [-1 / 3, 1 / 3, -1 / 3],
    [-16 / 15, -8 / 15, -4 / 15],
    [1 / 15, -2 / 15, 4 / 15],
    [0, 0, 1],
]
A_T = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 0.5, -2, 0],
    [0, 1, 1, 0.25, 4, 0],
    [0, 1, -1, 0.125, -8, 1],
]


def fits(weight: Tensor) -> bool:
    """Whether a convolution's weights [K, C, h, w] have a size that the kernel takes: 3x3, K and C multiples of 32."""
    return weight.shape[2:] == (3, 3) and weight.shape[0] % PANEL == 0 and weight.shape[1] % PANEL == 0


def transform(weight: Tensor) -> Tensor:
    """U, computed in float64: [K, C, 3, 3] -> float32 [36, K / 32, C, 32], 32 output channels beside each other.

    Raises: ValueError for weights that do not `fits`.
    """
    if weight.ndim != 4 or not fits(weight):
        raise ValueError(f"weight: got {list(weight.shape)}, needs [K, C, 3, 3] with K and C multiples of {PANEL}")
    g = torch.tensor(G, dtype=torch.float64, device=weight.device)
    u = torch.einsum("ip,kcpq,jq->ijkc", g, weight.double(), g)
    return u.reshape(SIDE**2, -1, PANEL, weight.shape[1]).transpose(2, 3).float().contiguous()


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, gelu: bool) -> Tensor:
    """The equations above, in x's type."""
    (n, _, h, w), panels, channels = x.shape, weight.shape[1], weight.shape[2]
    a, b = (torch.tensor(matrix, dtype=x.dtype, device=x.device) for matrix in (A_T, B_T))
    u = weight.to(x.dtype).reshape(SIDE, SIDE, panels, channels, PANEL)
    d = F.pad(x, (1, 1 + -w % TILE, 1, 1 + -h % TILE)).unfold(2, SIDE, TILE).unfold(3, SIDE, TILE)
    v = torch.einsum("ip,jq,ncyxpq->ijncyx", b, b, d)
    m = torch.einsum("ijncyx,ijock->ijnokyx", v, u)
    y = torch.einsum("pi,qj,ijnokyx->nokypxq", a, a, m)
    y = y.reshape(n, panels * PANEL, y.shape[3] * TILE, y.shape[5] * TILE)[:, :, :h, :w]
    y = y if bias is None else y + bias[:, None, None]
    y = F.gelu(y) if gelu else y
    return y if plus is None else y + plus.repeat(n // max(plus.shape[0], 1), 1, 1, 1)


@cache
def _kernel() -> ctypes._CFuncPtr:
    run = native.load(SOURCE).winograd
    run.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6 + [ctypes.c_int] * 2
    run.restype = None
    return run


@cache
def missing() -> str | None:
    """What this machine lacks to run the kernel, or None; builds it. Without it the operator is its reference."""
    try:
        _kernel()
    except native.Unavailable as lack:
        return str(lack)
    return None


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, gelu: bool) -> Tensor:
    """The kernel in winograd.cpp."""
    (n, channels, h, w), k = x.shape, weight.shape[1] * PANEL
    out = torch.empty((n, k, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    plus = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, bias, plus, out))
    repeated = 1 if plus is None else plus.shape[0]
    _kernel()(*pointers, n, h, w, channels, k, repeated, gelu, torch.get_num_threads())
    return out


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, gelu: bool) -> Tensor:
    if x.shape[0] and missing() is None:
        return launch(x, weight, bias, plus, gelu)
    return _elsewhere(x, weight, bias, plus, gelu)


def _elsewhere(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, gelu: bool) -> Tensor:
    return reference(x, weight, bias, plus, gelu).contiguous(memory_format=torch.channels_last)


# Not `torch.library.custom_op`, whose wrapper takes 60 us a call, as long as the convolution itself at batch 1.
_library = torch.library.Library("fused_ddpm", "FRAGMENT")
_library.define("winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? plus, bool gelu) -> Tensor")
_library.impl("winograd", _on_cpu, "CPU")
_library.impl("winograd", _elsewhere, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_ddpm::winograd", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, gelu: bool) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, weight.shape[1] * PANEL, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


operator = torch.ops.fused_ddpm.winograd.default


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, plus: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution with stride 1 and zero padding 1, then GELU and a sum, for inference.

    Args:
        x: float32 [n, C, h, w]; read fastest in channels_last.
        weight: float32 [36, K / 32, C, 32], from `transform`.
        bias: float32 [K], or None.
        gelu: whether GELU (with erf) follows.
        plus: float32 [n / r, K, h, w] that is added at the end, to every of r repetitions of its images; or None.

    On a CPU with AVX2 or AVX-512 and a C++ compiler by the kernel (see `missing`), elsewhere by the reference.

    Returns: float32 [n, K, h, w], channels_last. Not differentiable.
    Raises: TypeError or ValueError naming the argument, what it was and what it must be.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "plus": plus}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name}: got {tensor.dtype}, needs float32")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which winograd has not (torch.no_grad(), or convolution)")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got {list(x.shape)}, needs [n, C, h, w] with at least one pixel")
    n, channels, h, w = x.shape
    if weight.ndim != 4 or weight.shape[::3] != (SIDE**2, PANEL) or weight.shape[2] != channels:
        shape = f"[{SIDE**2}, K / {PANEL}, {channels}, {PANEL}]"
        raise ValueError(f"weight: got {list(weight.shape)}, needs {shape} (kernels.winograd.transform) to go with x")
    if not weight.is_contiguous():
        raise ValueError(f"weight: has strides {weight.stride()}, needs them as kernels.winograd.transform makes them")
    k = weight.shape[1] * PANEL
    if bias is not None and (bias.shape != (k,) or not bias.is_contiguous()):
        raise ValueError(f"bias: got {list(bias.shape)} with strides {bias.stride()}, needs contiguous [{k}]")
    if plus is not None:
        repeats = plus.shape[0] == n or (plus.shape[0] > 0 and n % plus.shape[0] == 0)
        if plus.ndim != 4 or plus.shape[1:] != (k, h, w) or not repeats:
            raise ValueError(f"plus: got {list(plus.shape)}, needs [{n} or a divisor, {k}, {h}, {w}]")
    backend.same_device(x, weight=weight, bias=bias, plus=plus)
    return operator(x, weight, bias, plus, gelu)


def cost(channels: int, columns: int, area: int, batch: int) -> Cost:
    """x read, the output written, the weights read once a batch; the flops of the direct convolution."""
    weights = SIDE**2 * channels / (batch * area)
    return Cost(bytes=4 * (1 + channels / columns + weights), flops=18 * channels)
