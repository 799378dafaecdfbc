"""The convolutions of a form: each keeps its weights as whoever runs it reads them fastest, see `Layout`.

With `kernels` a convolution and what follows it is one call of the operator `convolution`, on weights that are packed
for its C++ if asked for. Else 3x3 convolutions of float32 on CPUs are run by the operator `winograd`, others by the
library, and what follows by plain operators. A transposed convolution with kernel = stride = 2 is a product with
W [C_in, 2, 2, C_out] at every pixel. A convolution of either kind over cat(x, skip) is a sum of two, and guidance
shares the skip's between its halves.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.inference.form import Layout
from kernels import convolution, native, winograd
from kernels.convolution import KEEP, POOL, SOURCE, SPREAD
from kernels.packed import Packed, kind_of, pack
from kernels.winograd import fits, missing, transform

Gate = tuple[Tensor | None, Tensor]  # scale and shift of scale * y + shift, each [1 or k * n, C]


@cache
def uses_onednn_layout(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type on this CPU: then weights are kept in the layout it wants, GELU runs in it.

    It is asked by trying: whether it takes bfloat16 depends on the CPU and on ONEDNN_MAX_CPU_ISA.
    The operators are those that torch.compile itself emits for CPUs. Measured on two cores with AVX-512 (n_feat 64,
    16x16, channels_last, without `winograd`): 7.0 ms a step instead of 7.8 at batch 1, 80 instead of 85 at batch 32.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    probe = Convolution(gelu=True)
    x = torch.ones(1, 16, 4, 4, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            probe.pack(torch.ones(16, 16, 3, 3, dtype=dtype, device="cpu"))
            probe(x)
    except RuntimeError:
        return False
    return True


def store(module: nn.Module, **tensors: Tensor) -> None:
    """Set buffers, in place where they have room: a captured CUDA graph reads the memory that it was captured with."""
    for name, tensor in tensors.items():
        held = getattr(module, name, None)
        if held is None or held.is_mkldnn or held.stride() != tensor.stride() or held.device != tensor.device:
            module.register_buffer(name, tensor)
        else:
            held.copy_(tensor)


class Fused(nn.Module):
    """Keeps weights for the operator `convolution` as a kernel: buffers, and the shapes of those that are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def keep(self, dtype: torch.dtype, layout: Layout, **weights: Tensor) -> None:
        """Store weights [C', C, k, k], packed where C++ runs them and `layout` asks for it."""
        for name, weight in weights.items():
            if layout.pack and weight.is_cpu and dtype == torch.float32 and native.missing(SOURCE) is None:
                packed = pack(weight, kind_of(weight))
                self.shapes[name] = packed.shape
                store(self, **{name: packed.tensor})
            else:
                store(self, **{name: weight.to(dtype).contiguous(memory_format=layout.memory_format)})

    def kept(self, name: str) -> Tensor | Packed:
        """These weights as the operator takes them."""
        tensor = getattr(self, name)
        return Packed(tensor, self.shapes[name]) if name in self.shapes else tensor


def added(y: Tensor, shared: Tensor) -> Tensor:
    """y [k * n, ...] plus what its k halves share [n, ...]."""
    if shared.shape[0] == y.shape[0] and not torch.compiler.is_exporting():
        return y + shared
    return (y.unflatten(0, (-1, shared.shape[0])) + shared).flatten(0, 1)


def followed(y: Tensor, gate: Gate | None = None, onto: Tensor | None = None, then: str = KEEP) -> Tensor:
    """What may come after a convolution, by plain operators: the gate, a sum, pooling."""
    if gate is not None:
        scale, shift = gate[0], gate[1][:, :, None, None]
        y = y + shift if scale is None else torch.addcmul(shift, y, scale[:, :, None, None])
    y = y if onto is None else y + onto
    return F.max_pool2d(y, 2) if then == POOL else y


class Convolution(Fused):
    """A convolution with stride 1 that keeps the size, its bias and, if asked, GELU: [n, C, h, w] -> [n, C', h, w]."""

    def __init__(self, gelu: bool = False) -> None:
        super().__init__()
        self.gelu, self.padding = gelu, 0
        self.packed = self.transformed = self.fused = False
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def load(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: Layout) -> None:
        """Take over the weights [C', C, k, k] and [C'] of a convolution, k odd."""
        self.padding = weight.shape[-1] // 2
        self.fused = layout.kernels
        if bias is not None:
            store(self, bias=bias.to(dtype))
        on_cpu = layout.channels_last and weight.device.type == "cpu"
        self.transformed = on_cpu and layout.winograd and dtype == torch.float32 and fits(weight) and missing() is None
        if self.transformed:
            store(self, weight=transform(weight))
            return
        if self.fused:
            self.keep(dtype, layout, weight=weight)
            return
        weight = weight.to(dtype)
        # With one channel both layouts have the same strides, and torch.compile expects the other one of the two.
        if on_cpu and layout.pack and min(weight.shape[:2]) > 1 and uses_onednn_layout(dtype):
            self.pack(weight)
        else:
            store(self, weight=weight.contiguous(memory_format=layout.memory_format))

    def pack(self, weight: Tensor) -> None:
        """Keep weights in oneDNN's own layout."""
        self.packed, self.padding = True, weight.shape[-1] // 2
        store(self, weight=torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry(), None))

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride, dilation, groups."""
        return [self.padding] * 2, [1, 1], [1, 1], 1

    def forward(self, x: Tensor, gate: Gate | None = None, onto: Tensor | None = None, then: str = KEEP) -> Tensor:
        """Then the gate, plus `onto`, perhaps in its memory, then pooled: `then`."""
        if self.fused:
            scale, shift = gate or (None, None)
            more = {"film_scale": scale, "film_shift": shift, "onto": onto, "gelu": self.gelu, "then": then}
            return convolution(x, self.kept("weight"), self.bias, **more, kernel=True)
        if gate is None and onto is not None and not self.gelu:
            return followed(self._onto(x, onto), then=then)
        return followed(self._own(x), gate, onto, then)

    def _own(self, x: Tensor) -> Tensor:
        if self.transformed:
            return winograd(x, [self.weight], [self.bias], gelu=self.gelu)
        if self.packed:
            after = ("gelu", [], "none") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self._geometry(), *after)
        return convolution(x, self.weight, self.bias, gelu=self.gelu)

    @property
    def sums(self) -> bool:
        """Whether convolution and sum are one pass, which also repeats the images of `onto`."""
        # torch.compile cannot trace oneDNN's operator, and fuses the sum by itself.
        return self.transformed or (self.packed and not torch.compiler.is_compiling())

    def _onto(self, x: Tensor, onto: Tensor) -> Tensor:
        """The sum of the two."""
        if self.transformed:
            return winograd(x, [self.weight], [self.bias], plus=onto)
        if self.sums:
            if onto.shape[0] < x.shape[0]:
                onto = torch.cat((onto,) * (x.shape[0] // onto.shape[0]))  # keeps its layout, as `repeat` does not
            after = ("add", 1.0, None, [], None)
            convolve = torch.ops.mkldnn._convolution_pointwise_.binary
            return convolve(onto, x, self.weight, self.bias, *self._geometry(), *after)
        return self._own(x) + onto


class Chain(nn.Sequential):
    """Convolutions with GELU, one after the other; neighbours by one call of the operator `winograd`."""

    def __init__(self, count: int) -> None:
        super().__init__(*(Convolution(gelu=True) for _ in range(count)))

    def forward(self, x: Tensor, **after: Any) -> Tensor:
        """after: what follows the last one, as in `Convolution`."""
        *first, last = self
        waiting: list[Convolution] = []
        for each in first:
            if each.transformed:
                waiting.append(each)
            else:
                x, waiting = each(_together(waiting, x)), []
        if not (waiting and last.transformed):
            return last(_together(waiting, x), **after)
        return followed(_together([*waiting, last], x), **after)


def _together(convolutions: list[Convolution], x: Tensor) -> Tensor:
    if not convolutions:
        return x
    return winograd(x, [each.weight for each in convolutions], [each.bias for each in convolutions], gelu=True)


class Merging(nn.Module):
    """A convolution over cat(x, skip): x [k * n, C, h, w], share(skip [n, C, h, w]) -> [k * n, C', h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_skip = Convolution(), Convolution()

    def load(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, layout: Layout) -> None:
        """weight: [C', 2 C, k, k]; bias: [C']."""
        of_x, of_skip = weight.chunk(2, dim=1)
        self.of_x.load(of_x, None, dtype, layout)
        self.of_skip.load(of_skip, bias, dtype, layout)

    def share(self, skip: Tensor) -> Tensor:
        """The skip's share, which `forward` takes; the skip itself where one kernel makes both."""
        return skip if self.of_x.fused else self.of_skip(skip)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        if self.of_x.fused:
            more = {"skip": shared, "skip_weight": self.of_skip.kept("weight")}
            return convolution(x, self.of_x.kept("weight"), self.of_skip.bias, **more, kernel=True)
        return self.of_x(x, onto=shared) if self.of_x.sums else added(self.of_x(x), shared)


def _pixels(x: Tensor) -> Tensor:
    """[n, C, h, w] -> [n * h * w, C], a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Upsampling(Fused):
    """ConvTranspose with kernel = stride = 2 over cat(x [k * n, C, h, w], skip [n, C, h, w]), as two products."""

    def load(self, conv: nn.ConvTranspose2d, dtype: torch.dtype, layout: Layout) -> None:
        self.fused = layout.kernels
        store(self, bias=conv.bias.to(dtype).repeat(4))
        of_x, of_skip = conv.weight.permute(0, 2, 3, 1).flatten(1).chunk(2)
        if self.fused:
            of_x, of_skip = (of.t().contiguous()[:, :, None, None] for of in (of_x, of_skip))
            self.keep(dtype, layout, of_x=of_x, of_skip=of_skip)
        else:
            store(self, of_x=of_x.to(dtype).contiguous(), of_skip=of_skip.to(dtype).contiguous())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.fused:
            more = {"skip": skip, "skip_weight": self.kept("of_skip")}
            return convolution(x, self.kept("of_x"), self.bias, **more, then=SPREAD, kernel=True)
        if torch.compiler.is_compiling() and not x.is_cuda:
            # The compiler fuses the sums with the shuffle; a product onto something would copy that first.
            of_skip = self._spread(skip.permute(0, 2, 3, 1) @ self.of_skip + self.bias, skip)
            out = added(self._spread(x.permute(0, 2, 3, 1) @ self.of_x, x), of_skip)
            return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        shared = torch.addmm(self.bias, _pixels(skip), self.of_skip)
        if x.shape[0] == skip.shape[0]:
            out = shared.addmm_(_pixels(x), self.of_x)
        else:
            out = (_pixels(x) @ self.of_x).unflatten(0, (-1, shared.shape[0])).add_(shared)
        del shared
        return self._spread(out.flatten(0, -2), x).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def _spread(product: Tensor, x: Tensor) -> Tensor:
        """[n * h * w, 4 C'] of x's pixels -> [n, h, 2, w, 2, C']."""
        rows, _, h, w = x.shape
        return product.reshape(rows, h, w, 2, 2, -1).transpose(2, 3)
