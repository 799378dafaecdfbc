"""The inference form with every convolution and what follows it in one kernel, see `kernels.convolution`.

25 launches a call at 16x16 (guidance adds the second gate of the bottleneck and a concatenation there): bias, GELU, the
shortcut's sum, pooling and the gate are in the kernels, a skip connection is a second source. For 16-bit types on CUDA.
Whether it is faster than the library's convolutions, and for which batch, is not measured yet: no engine takes it by
itself, `ddpm-bench gpu` measures it.
"""

import torch
from torch import Tensor, nn

from ddpm.convolutions import Convolution, store
from ddpm.inference import GROUPS, InferenceUnet
from ddpm.networks import ContextUnet
from kernels import convolution, group_norm_relu


def _run(conv: Convolution, x: Tensor, **after: object) -> Tensor:
    return convolution(x, conv.weight, conv.bias, gelu=conv.gelu, kernel=True, **after)


def _run_all(convs: nn.Sequential, x: Tensor, **after: object) -> Tensor:
    """after: of the last one."""
    *first, last = convs
    for conv in first:
        x = _run(conv, x)
    return _run(last, x, **after)


class KernelUnet(InferenceUnet):
    """As `InferenceUnet`, always channels_last and shared."""

    def __init__(self, model: ContextUnet, dtype: torch.dtype) -> None:
        super().__init__(model, dtype, pack=False, winograd=False)

    @torch.no_grad()
    def refresh(self, model: ContextUnet) -> None:
        """As in `InferenceUnet`."""
        super().refresh(model)
        for upsampling in self.upsamplings:
            for name in ("of_x", "of_skip"):
                if not hasattr(upsampling, f"{name}_columns"):
                    upsampling.register_buffer(f"{name}_columns", None)
                store(upsampling, **{f"{name}_columns": getattr(upsampling, name).t().contiguous()[:, :, None, None]})

    def forward(self, x: Tensor, at: tuple[Tensor, ...], rows: tuple[Tensor, ...] | None) -> Tensor:
        """As in `InferenceUnet`."""
        features, *downs = self.encode(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        up = self.bottleneck(downs[-1], at[0], rows)
        gate = {"film_scale": None if rows is None else rows[1].flatten(0, 1), "film_shift": at[1]}
        for level, (upsampling, blocks) in enumerate(zip(self.upsamplings, self.ups, strict=True)):
            skip = {"skip": downs[-1 - level], "skip_weight": upsampling.of_skip_columns}
            up = convolution(up, upsampling.of_x_columns, upsampling.bias, **skip, then="spread", kernel=True)
            up = _run_all(blocks, up, **(gate if level == 0 else {}))
        of_x, of_skip = self.head_of_x, self.head_of_skip
        hidden = convolution(up, of_x.weight, of_skip.bias, skip=features, skip_weight=of_skip.weight, kernel=True)
        return _run(self.last, group_norm_relu(hidden, self.head_gain, self.head_offset, GROUPS, self.head_eps))

    def encode(self, x: Tensor) -> list[Tensor]:
        """As in `InferenceUnet`."""
        skips = [_run_all(self.initial, x, onto=x if self.shortcut is None else _run(self.shortcut, x))]
        for blocks in self.downs:
            skips.append(_run_all(blocks, skips[-1], then="pool"))
        return skips
