"""winograd: 3x3 convolutions, one after the other, with a quarter of the multiplications, for CPUs.

    V = B^T d B         d: the 6x6 pixels around a tile of 4x4, of one channel; V: its 36 points
    U = G g G^T         g: the 3x3 weights from one channel to another
    Y = A^T M A         M[k] = sum_c U[k, c] * V[c], point by point: 36 products [tiles, C] x [C, K]
    x <- GELU(Y + bias) after each convolution, out = x + plus at the end, whose images repeat under guidance;
                        GELU, bias and plus are optional

F(4x4, 3x3) of Winograd's minimal filtering (Lavin & Gray: Fast Algorithms for Convolutional Neural Networks, 2016,
equation 8), evaluated at 0, 1, -1, 1/2, -2 and infinity: A, B and G follow from the points by the construction of Cook
and Toom (Barabasz et al.: Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks,
2020, who compare points). Inference only: no autograd. There is no Triton kernel: for GPUs there is `convolution`.

Three times as fast as oneDNN's convolution, see docs/kernels.md. It rounds more: the root mean square error is 1.6
times that of the direct sum (4.6e-7 against 2.9e-7 for normal inputs and 64 channels; the largest are 5.5e-6 and
5.0e-6). Points 0, 1, -1, 2, -2 have half as much again. A pixel that is no finite number makes its tile, and tiles
beside it, NaN.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, native
from kernels.backend import Cost

SOURCE = native.source_of("winograd")
TILE, SIDE = 4, 6
PANEL = 32  # output channels that native/winograd.cpp computes at once
# Bytes of an image's widest features up to which it goes through all convolutions before the next one does, so that
# they stay in the second cache (1 MiB): a tenth less time for four convolutions with 64 channels, 16x16, batch 32 (two
# cores at 2.5 GHz). The limit itself is untuned.
KEPT = 1 << 18
# Tiles a thread below which images go layer by layer all the same: else every thread reads all weights for little work.
# Four convolutions there: 1.5 times as long with 4 tiles and 256 channels, 1.2 with 4 and 128, as long with 8.
FEW = 8

# Each row of B^T is a polynomial with roots at the other points, of G and A^T the powers of its (column's) point, in G
# over the product of distances; the last is infinity's.
POINTS = (0, 1, -1, 1 / 2, -2)
OTHERS = [[other for other in POINTS if other != point] for point in POINTS]
B_T = [[*np.poly(others)[::-1].tolist(), 0.0] for others in OTHERS] + [np.poly(POINTS)[::-1].tolist()]
G = [
    [p**i / math.prod(p - other for other in others) for i in range(3)]
    for p, others in zip(POINTS, OTHERS, strict=True)
]
G += [[0, 0, 1]]
A_T = [[*(point**i for point in POINTS), i // 3] for i in range(4)]


def fits(weight: Tensor) -> bool:
    """Whether these are weights that the kernel takes: [K, C, 3, 3], K and C multiples of 32."""
    return weight.shape[2:] == (3, 3) and weight.shape[0] % PANEL == 0 and weight.shape[1] % PANEL == 0


def transform(weight: Tensor) -> Tensor:
    """U, computed in float64: [K, C, 3, 3] -> float32 [K / 32, 36, C, 32], 32 output channels beside each other.

    Raises: ValueError for weights that do not `fits`.
    """
    if not fits(weight):
        raise ValueError(f"weight: got {list(weight.shape)}, needs [K, C, 3, 3] with K and C multiples of {PANEL}")
    g = torch.tensor(G, dtype=torch.float64, device=weight.device)
    u = torch.einsum("ip,kcpq,jq->kijc", g, weight.double(), g)
    return u.reshape(-1, PANEL, SIDE**2, weight.shape[1]).permute(0, 2, 3, 1).float().contiguous()


def reference(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], plus: Tensor | None, gelu: bool) -> Tensor:
    """The equations above, in x's type."""
    n, _, h, w = x.shape
    a, b = (torch.tensor(matrix, dtype=x.dtype, device=x.device) for matrix in (A_T, B_T))
    for weight, bias in zip(weights, biases, strict=True):
        u = weight.to(x.dtype).unflatten(1, (SIDE, SIDE))
        d = F.pad(x, (1, 1 + -w % TILE, 1, 1 + -h % TILE)).unfold(2, SIDE, TILE).unfold(3, SIDE, TILE)
        v = torch.einsum("ip,jq,ncyxpq->ijncyx", b, b, d)
        m = torch.einsum("ijncyx,oijck->ijnokyx", v, u)
        y = torch.einsum("pi,qj,ijnokyx->nokypxq", a, a, m)
        x = y.reshape(n, _columns(weight), y.shape[3] * TILE, y.shape[5] * TILE)[:, :, :h, :w]
        x = x if bias is None else x + bias[:, None, None]
        x = F.gelu(x) if gelu else x
    return x if plus is None else x + plus.repeat(n // max(plus.shape[0], 1), 1, 1, 1)


@cache
def _kernel() -> ctypes._CFuncPtr:
    run = native.load(SOURCE).winograd
    run.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] + [ctypes.c_int64] * 2
    run.argtypes += [ctypes.c_int] * 2
    run.restype = ctypes.c_int
    return run


@cache
def missing() -> str | None:
    """What this machine lacks to run the kernel, or None; builds it. Without it the operator is its reference."""
    try:
        _kernel()
    except native.Unavailable as lack:
        return str(lack)
    return None


def launch(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], plus: Tensor | None, gelu: bool) -> Tensor:
    """The kernel in native/winograd.cpp."""
    (n, _, h, w), threads = x.shape, torch.get_num_threads()
    widths = [x.shape[1], *map(_columns, weights)]
    out = _fake(x, weights)
    x = x.contiguous(memory_format=torch.channels_last)
    plus = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
    image = h * w * max(widths[1:])
    busy = n >= threads and n * -(-h // TILE) * -(-w // TILE) >= FEW * threads
    by_images = len(weights) == 1 or (busy and image * x.element_size() <= KEPT)
    scratch = None if by_images else x.new_empty(2, n, image)
    several = ctypes.c_void_p * len(weights)
    u_at, bias_at = several(*map(_address, weights)), several(*map(_address, biases))
    counts = (n, h, w, (ctypes.c_int64 * len(widths))(*widths), len(weights), 1 if plus is None else plus.shape[0])
    if _kernel()(_address(x), u_at, bias_at, *map(_address, (plus, out, scratch)), *counts, gelu, threads):
        raise MemoryError(f"winograd: no memory for the {threads} threads of a convolution of {list(x.shape)}")
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _columns(weight: Tensor) -> int:
    return weight.shape[0] * PANEL


def _elsewhere(x: Tensor, *others: Any) -> Tensor:
    return reference(x, *others).contiguous(memory_format=torch.channels_last)


def _on_cpu(x: Tensor, *others: Any) -> Tensor:
    run = launch if x.shape[0] and x.dtype == torch.float32 and missing() is None else _elsewhere
    return run(x, *others)


def _fake(x: Tensor, weights: list[Tensor], *others: Any) -> Tensor:
    shape = (x.shape[0], _columns(weights[-1]), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# Not `torch.library.custom_op`, whose wrapper takes 60 us a call, as long as a convolution at batch 1.
_library = torch.library.Library("fused_ddpm", "FRAGMENT")
_library.define("winograd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? plus, bool gelu) -> Tensor")
_library.impl("winograd", _on_cpu, "CPU")
_library.impl("winograd", _elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ddpm::winograd", _fake, lib=_library)
operator = torch.ops.fused_ddpm.winograd.default


def _check(name: str, tensor: Tensor | None) -> None:
    backend.check_tensors({name: tensor})
    if tensor is not None and tensor.dtype != torch.float32:
        raise TypeError(f"{name}: got {tensor.dtype}, needs float32")
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, which winograd has not (torch.no_grad(), or convolution)")


def winograd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    gelu: bool = False,
    plus: Tensor | None = None,
) -> Tensor:
    """3x3 convolutions with stride 1 and zero padding 1, one after the other, for inference.

    Args:
        x: float32 [n, C_0, h, w]; read fastest in channels_last.
        weights: of each convolution float32 [C_i / 32, 36, C_(i-1), 32], from `transform`.
        biases: of each convolution float32 [C_i], or None.
        gelu: whether GELU (with erf) follows each.
        plus: float32 [n / r, C, h, w] that is added at the end, to every of r repetitions of its images; or None.

    On a CPU with AVX2 or AVX-512 and a C++ compiler by the kernel (see `missing`), elsewhere by the reference.

    Returns: float32 [n, C, h, w], channels_last. Not differentiable. Raises MemoryError where threads find no room.
    """
    for name, several in (("weights", weights), ("biases", biases)):
        if not isinstance(several, list | tuple):
            raise TypeError(f"{name}: got a {type(several).__name__}, needs a list of tensors, one a convolution")
    backend.check_tensors(x=x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights: got {len(weights)} with {len(biases)} biases, needs one or more, each with its own")
    _check("x", x)
    _check("plus", plus)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got {list(x.shape)}, needs [n, C, h, w] with at least one pixel")
    n, channels, h, w = x.shape
    if channels % PANEL:
        raise ValueError(f"x: got {channels} channels, needs a multiple of {PANEL}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check(f"weights[{i}]", weight)
        _check(f"biases[{i}]", bias)
        backend.same_device(x, **{f"weights[{i}]": weight, f"biases[{i}]": bias})
        if weight.ndim != 4 or weight.shape[1::2] != (SIDE**2, PANEL) or weight.shape[2] != channels or not len(weight):
            shape = f"[K / {PANEL}, {SIDE**2}, {channels}, {PANEL}]"
            raise ValueError(f"weights[{i}]: got {list(weight.shape)}, needs {shape}, see kernels.winograd.transform")
        if not weight.is_contiguous():
            raise ValueError(f"weights[{i}]: has strides {weight.stride()}, needs a contiguous tensor")
        channels = _columns(weight)
        if bias is not None and (bias.shape != (channels,) or not bias.is_contiguous()):
            found = f"{list(bias.shape)} with strides {bias.stride()}"
            raise ValueError(f"biases[{i}]: got {found}, needs contiguous [{channels}]")
    if plus is not None:
        backend.same_device(x, plus=plus)
        rows = plus.shape[0] if plus.ndim == 4 else 0
        if plus.shape[1:] != (channels, h, w) or not (rows == n or (rows and n % rows == 0)):
            raise ValueError(f"plus: got {list(plus.shape)}, needs [{n} or a divisor, {channels}, {h}, {w}]")
    return operator(x, list(weights), list(biases), plus, bool(gelu))


def cost(channels: int, columns: int, area: int, batch: int) -> Cost:
    """One convolution: x read, out written, the weights read once a batch; the flops of the direct convolution."""
    weights = SIDE**2 * channels / (batch * area)
    return Cost(bytes=4 * (1 + channels / columns + weights), flops=18 * channels)
