"""The network as it is exported: `ddpm.inference` in operators that ONNX has, each step exact.

- BatchNorm is folded into its convolution before any cast.
- The encoder, up0 and every skip see neither time nor context: they are computed once for all halves of guidance.
- The first block's sum is divided by 1.414 in the weights that read it.
- A convolution over cat(a, b) is a sum of two convolutions, so a skip's share is not repeated either.
- ConvTranspose of kernel = stride is a matrix product at every pixel, channels last, and a move of whole rows of
  channels. onnxruntime, n_feat 64 at 16x16, batch 32: 0.6 ms for the last one, ConvTranspose itself 0.8, a 1x1
  convolution with DepthToSpace 2.3. up0, whose input is one pixel, is one product.

Time and context enter as gates, one per gated level: up <- context * up + time.
"""

import copy

import torch
from torch import Tensor, nn

from ddpm.inference import fold_batch_norm, leave_division_to_readers
from ddpm.networks import ContextUnet, EmbedFC

GATED_LEVELS = 2


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """weight [out, in]."""
    layer = nn.Linear(*weight.T.shape, bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _conv(weight: Tensor, bias: Tensor | None, padding: int) -> nn.Conv2d:
    out_channels, in_channels, kernel, _ = weight.shape
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _upsampling(transposed: nn.ConvTranspose2d) -> tuple[nn.Linear, nn.Linear]:
    """The two shares of a transposed convolution over cat(x, skip): of x, without bias, and of the skip, with it.

    Each is a product from C to the 2 x 2 x C' values of an input pixel.
    """
    weight = transposed.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)
    half = weight.shape[1] // 2
    bias = transposed.bias.detach().repeat(transposed.stride[0] ** 2)
    return _linear(weight[:, :half], None), _linear(weight[:, half:], bias)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _spread(pixels: Tensor) -> Tensor:
    """[n, h, w, 2 * 2 * C] -> [n, C, 2h, 2w]."""
    rows = pixels.unflatten(-1, (2, 2, -1)).permute(0, 1, 3, 2, 4, 5)
    return rows.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class GatedNetwork(nn.Module):
    """A ContextUnet whose conditions are gates: forward(x, *gates) -> m.

    x: [n, C, H, W]. gates: time1, time2 [1 or n, width], then for a conditional network context1, context2
    [copies, n, width]; width as of the gated level. Returns m [copies * n, C, H, W]: all of copy 0 first. copies is 2
    under guidance and 1 without; an unconditional network has one copy.
    """

    def __init__(self, model: ContextUnet) -> None:
        super().__init__()
        model = fold_batch_norm(model).float()
        leave_division_to_readers(model)
        self.depth, self.conditional = model.depth, bool(model.n_cfeat)
        self.init_conv, self.to_vec = model.init_conv, model.to_vec
        self.downs = nn.ModuleList(getattr(model, f"down{level}") for level in range(1, self.depth + 1))
        bottleneck, self.up0_norm, _ = model.up0
        self.side = bottleneck.stride[0]
        bias = bottleneck.bias.detach().repeat_interleave(self.side**2)
        self.up0 = _linear(bottleneck.weight.detach().flatten(1).T, bias)
        ups = [getattr(model, f"up{level}").model for level in range(1, self.depth + 1)]
        shares = [_upsampling(up[0]) for up in ups]
        self.up_shares = nn.ModuleList(share for share, _ in shares)
        self.skip_shares = nn.ModuleList(share for _, share in shares)
        self.up_blocks = nn.ModuleList(up[1:] for up in ups)
        first, *self_rest = model.out
        weight, half = first.weight.detach(), first.in_channels // 2
        self.out_share = _conv(weight[:, :half], None, 1)
        self.features_share = _conv(weight[:, half:], first.bias.detach(), 1)
        self.out = nn.Sequential(*self_rest)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What neither time nor context changes: (up0's output, the share of each skip from the deepest on)."""
        features = self.init_conv.shortcut(x) + self.init_conv.conv2(self.init_conv.conv1(x))
        skips = [features]
        for down in self.downs:
            skips.append(down(skips[-1]))
        vector = self.up0(self.to_vec(skips[-1]).flatten(1))
        up = torch.relu(self.up0_norm(vector.unflatten(1, (-1, self.side, self.side))))
        shares = [share(_channels_last(skips[-k])) for k, share in enumerate(self.skip_shares, start=1)]
        return up, [*shares, self.features_share(features)]

    def decode(self, up: Tensor, shares: list[Tensor], gates: tuple[Tensor, ...]) -> Tensor:
        """m from what `encode` returned and the gates."""
        for level in range(self.depth):
            if level < GATED_LEVELS:
                up = self._gate(level, up, gates)
            pixels = self._sum(self.up_shares[level](_channels_last(up)), shares[level])
            up = self.up_blocks[level](_spread(pixels))
        return self.out(self._sum(self.out_share(up), shares[-1]))

    def forward(self, x: Tensor, *gates: Tensor) -> Tensor:
        return self.decode(*self.encode(x), gates)

    def _gate(self, level: int, up: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        time = gates[level][:, :, None, None]
        if not self.conditional:
            return up + time
        context = gates[GATED_LEVELS + level][..., None, None]
        shared = up[None] if level == 0 else up.unflatten(0, context.shape[:2])
        return (context * shared + time).flatten(0, 1)

    def _sum(self, many: Tensor, one: Tensor) -> Tensor:
        """Every copy's rows plus the rows that all copies share."""
        if not self.conditional:
            return many + one
        return (many.unflatten(0, (-1, one.shape[0])) + one).flatten(0, 1)


def embeddings(model: ContextUnet, kind: str) -> list[EmbedFC]:
    """The embedding of each gated level; kind is `time` or `context`."""
    return [getattr(model, f"{kind}embed{level}") for level in range(1, GATED_LEVELS + 1)]


class Denoiser(nn.Module):
    """The folded network with its embeddings: forward(x, t[, context]) -> m, as the ContextUnet's own forward."""

    def __init__(self, model: ContextUnet) -> None:
        super().__init__()
        self.network = GatedNetwork(model)
        self.time = nn.ModuleList(copy.deepcopy(embeddings(model, "time")))
        self.context = nn.ModuleList(copy.deepcopy(embeddings(model, "context")) if model.n_cfeat else [])

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        contexts = [embed(context)[None] for embed in self.context]
        return self.network(x, *(embed(t) for embed in self.time), *contexts)
