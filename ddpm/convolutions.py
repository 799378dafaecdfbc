"""The convolutions of an inference form: each keeps its weights as whoever runs it reads them fastest.

3x3 convolutions of float32 on CPUs are run by the operator `winograd`, others by the library. A transposed convolution
with kernel = stride = 2 is a product with W [C_in, 2, 2, C_out] at every pixel, over cat(x, skip) a sum of two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import winograd
from kernels.winograd import fits, missing, transform


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type here: its weights are then kept in the layout it wants, GELU runs in it.

    The operators are those that torch.compile itself emits for CPUs. Measured on two cores with AVX-512 (n_feat 64,
    16x16, channels_last, without `winograd`): 7.0 ms a step instead of 7.8 at batch 1, 80 instead of 85 at batch 32.
    """
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()


def multiplies_less(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operator `winograd` takes a convolution's weights in this type here, and runs its kernel."""
    return weight.device.type == "cpu" and dtype == torch.float32 and fits(weight) and missing() is None


def store(module: nn.Module, **tensors: Tensor) -> None:
    """Set buffers, in place where they have room: a captured CUDA graph reads the memory that it was captured with."""
    for name, tensor in tensors.items():
        held = getattr(module, name)
        if held is None or held.is_mkldnn or held.stride() != tensor.stride() or held.device != tensor.device:
            setattr(module, name, tensor)
        else:
            held.copy_(tensor)


class Convolution(nn.Module):
    """A convolution with stride 1 that keeps the size, bias and, if asked, GELU: [n, C, h, w] -> [n, C', h, w]."""

    def __init__(self, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.padding = 0
        self.packed = self.transformed = False
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def load(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        channels_last: bool,
        pack: bool,
        winograd: bool,
    ) -> None:
        """Take over the weights [C', C, k, k] and [C'] of a convolution, k odd.

        pack: for oneDNN where it `packs`. winograd: by that operator where it `multiplies_less`.
        """
        self.padding = weight.shape[-1] // 2
        if bias is not None:
            store(self, bias=bias.to(dtype))
        self.transformed = winograd and channels_last and multiplies_less(weight, dtype)
        if self.transformed:
            store(self, weight=transform(weight))
            return
        weight = weight.to(dtype)
        # With one channel both layouts have the same strides, and torch.compile expects the other one of the two.
        self.packed = pack and channels_last and min(weight.shape[:2]) > 1 and packs(weight.device, dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry(), None)
        elif channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        store(self, weight=weight)

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride, dilation, groups."""
        return [self.padding] * 2, [1, 1], [1, 1], 1

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """onto: what the result (without GELU) is added to, perhaps in its memory; its images repeat."""
        if self.transformed:
            return winograd(x, [self.weight], [self.bias], gelu=self.gelu, plus=onto)
        if onto is not None and onto.shape[0] < x.shape[0]:
            onto = torch.cat((onto,) * (x.shape[0] // onto.shape[0]))  # keeps its layout, as `repeat` does not
        if onto is not None and self.packed and not torch.compiler.is_compiling():
            # torch.compile cannot trace this operator, and fuses the sum by itself.
            after = ("add", 1.0, None, [], None)
            convolve = torch.ops.mkldnn._convolution_pointwise_.binary
            return convolve(onto, x, self.weight, self.bias, *self._geometry(), *after)
        if self.packed:
            after = ("gelu", [], "none") if self.gelu else ("none", [], "")
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self._geometry(), *after)
        else:
            y = F.conv2d(x, self.weight, self.bias, padding=self.padding)
            y = F.gelu(y) if self.gelu else y
        return y if onto is None else onto.add_(y)


class Chain(nn.Sequential):
    """Convolutions with GELU, one after the other; neighbours by one call of the operator `winograd`."""

    def __init__(self, count: int) -> None:
        super().__init__(*(Convolution(gelu=True) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        waiting: list[Convolution] = []
        for convolution in self:
            if convolution.transformed:
                waiting.append(convolution)
            else:
                x, waiting = convolution(_together(waiting, x)), []
        return _together(waiting, x)


def _together(convolutions: list[Convolution], x: Tensor) -> Tensor:
    if not convolutions:
        return x
    return winograd(x, [each.weight for each in convolutions], [each.bias for each in convolutions], gelu=True)


def _pixels(x: Tensor) -> Tensor:
    """[n, C, h, w] -> [n * h * w, C], a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Upsampling(nn.Module):
    """ConvTranspose with kernel = stride = 2 over cat(x, skip), as two products.

    x [k * n, C, h, w], skip [n, C, h, w] -> [k * n, C', 2h, 2w]; k halves share the skip.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("of_x", "of_skip", "bias"):
            self.register_buffer(name, None)

    def load(self, conv: nn.ConvTranspose2d, dtype: torch.dtype) -> None:
        """Take over a transposed convolution's weights."""
        of_x, of_skip = conv.weight.permute(0, 2, 3, 1).flatten(1).to(dtype).chunk(2)
        store(self, of_x=of_x.contiguous(), of_skip=of_skip.contiguous(), bias=conv.bias.to(dtype).repeat(4))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        halves = x.shape[0] // skip.shape[0]
        if torch.compiler.is_compiling() and not x.is_cuda:
            # It fuses the three sums with the shuffle; a product onto something would copy that first.
            of_skip = self._spread(_pixels(skip) @ self.of_skip, skip)
            out = self._spread(_pixels(x) @ self.of_x, x).unflatten(0, (halves, -1)) + of_skip + self.bias.chunk(4)[0]
            return out.flatten(0, 1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        shared = torch.addmm(self.bias, _pixels(skip), self.of_skip)
        if halves == 1:
            out = shared.addmm_(_pixels(x), self.of_x)
        else:
            out = (_pixels(x) @ self.of_x).unflatten(0, (halves, -1)).add_(shared)
        del shared
        return self._spread(out.flatten(0, -2), x).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def _spread(product: Tensor, x: Tensor) -> Tensor:
        """[n * h * w, 4 C'] of x's pixels -> [n, h, 2, w, 2, C']."""
        rows, _, h, w = x.shape
        return product.reshape(rows, h, w, 2, 2, -1).transpose(2, 3)
