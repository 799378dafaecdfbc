"""The inference form of a network: what sampling may exploit, each exact up to rounding.

    BatchNorm in eval mode is affine, so it joins its convolution:
        w' = w gamma / sqrt(var + eps)      b' = (b - mean) gamma / sqrt(var + eps) + beta
    t takes S values in a run, so the time embeddings are tables [S, C]; the context embeddings are computed once.
    Encoder, bottleneck and its normalisation see neither, so guidance shares them between its two halves.
    A transposed convolution with kernel = stride = 2 is a product with W [C_in, 2, 2, C_out] at every pixel.
    The first block's sum is divided by 1.414 in the weights that read it.
    Over cat(x, skip) a convolution of either kind is a sum of two, W_x x + W_skip skip. Guidance shares the latter.

`refresh` folds the weights anew, so nothing can be stale: `sample` calls it at its start.
"""

import copy
import json
import logging
import platform
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ddpm.convolutions import Chain, Convolution, Upsampling, store
from ddpm.networks import GROUPS, ContextUnet, ResidualConvBlock, build_network
from kernels import bottleneck, group_norm_relu
from kernels.winograd import PANEL, fits, missing

logger = logging.getLogger("ddpm")


def fold_batch_norm(model: ContextUnet, dtype: torch.dtype | None = None) -> ContextUnet:
    """A copy in eval mode, every BatchNorm folded into its convolution in float64; of `dtype`, default the model's."""
    dtype = dtype or next(model.parameters()).dtype
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    for block in model.modules():
        if isinstance(block, ResidualConvBlock):
            for half in (block.conv1, block.conv2):
                half[0], half[1] = fuse_conv_bn_eval(half[0], half[1]), nn.Identity()
    return model.to(dtype)


def leave_division_to_readers(model: ContextUnet) -> None:
    """In place: what reads the first block's sum divides it by 1.414 itself, so one pass over its features is saved."""
    for reader in (model.down1.model[0].conv1[0].weight, model.out[0].weight.chunk(2, dim=1)[1]):
        reader.div_(1.414)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; taken for granted where it is no x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What an inference form computes in: float32 for bfloat16 on a CPU that emulates it, which is slower and coarser.

    37 ms a guided step instead of 265 at batch 32 (n_feat 64, 16x16, two cores with AVX-512 and without AVX512-BF16).
    """
    emulated = dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16()
    return torch.float32 if emulated else dtype


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


@dataclass(frozen=True)
class Conditions:
    """What the steps of a chunk have in common.

    tables: what depends on the step, each [S, ...]. rows: what depends on the row, each [k, n, C], or None; k is 2
    under guidance (conditional half first), else 1.
    """

    tables: tuple[Tensor, ...]
    rows: tuple[Tensor, ...] | None

    @property
    def halves(self) -> int:
        """2 under guidance, else 1."""
        return 1 if self.rows is None else self.rows[0].shape[0]

    def at(self, index: Tensor) -> tuple[Tensor, ...]:
        """The tables' rows [1, ...] at an index int64 [1], which may live on a device."""
        return tuple(table.index_select(0, index) for table in self.tables)


def _context_rows(context: Tensor | None, n: int, n_cfeat: int, guided: bool, like: Tensor) -> Tensor:
    """[k, n, n_cfeat] of like's type: the contexts (None = zeros), and under guidance zeros."""
    if context is not None and context.shape != (n, n_cfeat):
        raise ValueError(f"c: got shape {list(context.shape)}, needs [{n}, {n_cfeat}]")
    zeros = like.new_zeros(n, n_cfeat)
    rows = zeros if context is None else context.to(like)
    return torch.stack((rows, zeros)) if guided else rows[None]


class InferenceUnet(nn.Module):
    """A ContextUnet for sampling: forward(x, at, rows) -> m [k * n, C, H, W] for x [n, C, H, W].

    Args:
        model: the network, on its device; it is not changed.
        dtype: what to compute in.
        channels_last: the memory layout of the features (and oneDNN's layout for weights on the CPU).
        shared: whether guidance shares the encoder and the skips; False repeats x, for comparison.
        pack, winograd: how convolutions keep their weights, see `Convolution.load`.
    """

    def __init__(
        self,
        model: ContextUnet,
        dtype: torch.dtype,
        channels_last: bool = True,
        shared: bool = True,
        pack: bool = True,
        winograd: bool = True,
    ) -> None:
        super().__init__()
        self.dtype, self.channels_last, self.shared = dtype, channels_last, shared
        self.pack, self.winograd = pack, winograd
        self.depth, self.n_cfeat = model.depth, model.n_cfeat
        self.shortcut = None if isinstance(model.init_conv.shortcut, nn.Identity) else Convolution()
        self.initial = Chain(2)
        self.downs = nn.ModuleList(Chain(4) for _ in range(self.depth))
        self.upsamplings = nn.ModuleList(Upsampling() for _ in range(self.depth))
        self.ups = nn.ModuleList(Chain(4) for _ in range(self.depth))
        self.head_of_x, self.head_of_skip, self.last = Convolution(), Convolution(), Convolution()
        for name in ("up0_weight", "up0_bias", "up0_gain", "up0_offset", "head_gain", "head_offset"):
            self.register_buffer(name, None)
        self.folded: list[Tensor] = []
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: ContextUnet) -> None:
        """Fold the model's present weights, if they changed. Shapes stay, so what compiled this network serves on."""
        present = [*model.parameters(), *model.buffers()]
        if self.folded and all(map(_same, present, self.folded)):
            return
        model = fold_batch_norm(model, torch.float64)
        dtype, layout = self.dtype, self.channels_last
        kept = {"dtype": dtype, "channels_last": layout, "pack": self.pack, "winograd": self.winograd}

        def load(sequence: nn.Sequential, *blocks: ResidualConvBlock) -> None:
            convs = [half[0] for block in blocks for half in (block.conv1, block.conv2)]
            for own, conv in zip(sequence, convs, strict=True):
                own.load(conv.weight, conv.bias, **kept)

        load(self.initial, model.init_conv)
        if self.shortcut is not None:
            shortcut = model.init_conv.shortcut
            self.shortcut.load(shortcut.weight, shortcut.bias, **kept)
        leave_division_to_readers(model)
        for level in range(1, self.depth + 1):
            down, up = getattr(model, f"down{level}").model, getattr(model, f"up{level}").model
            load(self.downs[level - 1], down[0], down[1])
            self.upsamplings[level - 1].load(up[0], dtype)
            load(self.ups[level - 1], up[1], up[2])
        up0, norm = model.up0[0], model.up0[1]
        memory_format = torch.channels_last if layout else torch.contiguous_format
        store(self, up0_weight=up0.weight.to(dtype, memory_format=memory_format), up0_bias=up0.bias.to(dtype))
        store(self, up0_gain=norm.weight.to(dtype), up0_offset=norm.bias.to(dtype))
        self.up0_eps, self.head_eps = norm.eps, model.out[1].eps
        of_x, of_skip = model.out[0].weight.chunk(2, dim=1)
        self.head_of_x.load(of_x, None, **kept)
        self.head_of_skip.load(of_skip, model.out[0].bias, **kept)
        store(self, head_gain=model.out[1].weight.to(dtype), head_offset=model.out[1].bias.to(dtype))
        self.last.load(model.out[3].weight, model.out[3].bias, **kept)
        # Not registered: only `conditions` calls them, at least in float32.
        kind = torch.promote_types(dtype, torch.float32)
        self.embeddings = {name: child.to(kind) for name, child in model.named_children() if "embed" in name}
        self.folded = [tensor.clone() for tensor in present]

    @torch.no_grad()
    def conditions(self, times: Tensor, context: Tensor | None, n: int, guided: bool) -> Conditions:
        """times: float [S], t / T of every step; context: [n, n_cfeat] or None = zeros."""
        like = next(self.embeddings["timeembed1"].parameters())
        times = times.to(like).reshape(-1, 1)
        shifts = tuple(self.embeddings[f"timeembed{level}"](times).to(self.dtype) for level in (1, 2))
        rows = _context_rows(context, n, self.n_cfeat, guided, like)
        if self.n_cfeat == 0:
            return Conditions(shifts, None)
        scales = (self.embeddings[f"contextembed{level}"](rows).to(self.dtype) for level in (1, 2))
        return Conditions(shifts, tuple(scale.unflatten(0, rows.shape[:2]) for scale in scales))

    def forward(self, x: Tensor, at: tuple[Tensor, ...], rows: tuple[Tensor, ...] | None) -> Tensor:
        """at: a step's `Conditions.at`; rows: `Conditions.rows`. x may be wider than the network's type."""
        x = x.to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.shared and rows is not None:
            x, rows = torch.cat((x,) * rows[0].shape[0]), tuple(row.flatten(0, 1)[None] for row in rows)
        features, *downs = self.encode(x)
        up = self.bottleneck(downs[-1], at[0], rows)
        for level in range(self.depth):
            if level == 1:
                up = self.gate(up, at[1], rows)
            up = self.ups[level](self.upsamplings[level](up, downs[-1 - level]))
        hidden = self.head_of_skip(features)
        del features, downs  # the widest tensors: here memory is at its peak
        hidden = self.head_of_x(up, onto=hidden)
        return self.last(group_norm_relu(hidden, self.head_gain, self.head_offset, GROUPS, self.head_eps))

    def encode(self, x: Tensor) -> list[Tensor]:
        """The features at full size (undivided: see `leave_division_to_readers`), then those of each level."""
        hidden = self.initial(x)
        hidden = hidden.add_(x) if self.shortcut is None else self.shortcut(x, onto=hidden)
        skips = [hidden]
        for blocks in self.downs:
            skips.append(F.max_pool2d(blocks(skips[-1]), 2))
        return skips

    def bottleneck(self, x: Tensor, shift: Tensor, rows: tuple[Tensor, ...] | None) -> Tensor:
        """From the deepest features to the first gate, once for each half's scale: [n, ...] -> [k * n, ...]."""
        up0 = (self.up0_weight, self.up0_bias, self.up0_gain, self.up0_offset)
        scales = (None,) if rows is None else rows[0].unbind()
        gated = [bottleneck(x, *up0, scale, shift, GROUPS, self.up0_eps) for scale in scales]
        return gated[0] if len(gated) == 1 else torch.cat(gated)

    @staticmethod
    def gate(up: Tensor, shift: Tensor, rows: tuple[Tensor, ...] | None) -> Tensor:
        """The second gate, scale * up + shift."""
        shift = shift[:, :, None, None]
        return up + shift if rows is None else torch.addcmul(shift, up, rows[1].flatten(0, 1)[:, :, None, None])


class PlainForm(nn.Module):
    """Any other network in the same clothes: nothing folded, guidance on twice the rows."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        kind = next(model.parameters(), torch.empty(0, dtype=dtype)).dtype
        self.model = model if kind == dtype else copy.deepcopy(model).to(dtype)

    def conditions(self, times: Tensor, context: Tensor | None, n: int, guided: bool) -> Conditions:
        """As in `InferenceUnet`."""
        times = times.to(self.dtype)
        if context is None:
            return Conditions((times,), None)
        return Conditions((times,), (_context_rows(context, n, context.shape[1], guided, times),))

    def forward(self, x: Tensor, at: tuple[Tensor, ...], rows: tuple[Tensor, ...] | None) -> Tensor:
        """As in `InferenceUnet`."""
        x = x.to(self.dtype)
        halves = 1 if rows is None else rows[0].shape[0]
        x = torch.cat((x,) * halves) if halves > 1 else x
        m = self.model(x, at[0].expand(x.shape[0]), None if rows is None else rows[0].flatten(0, 1))
        if m.shape != x.shape:
            raise ValueError(f"model: returned {list(m.shape)}, needs the shape of x {list(x.shape)}")
        return m


# What says nothing of a forward pass in eval mode.
IRRELEVANT = {"training", "momentum", "inplace"}


def _kinds(model: nn.Module) -> dict[str, tuple[type, dict[str, object]]]:
    """The class and the plain attributes (sizes, modes, switches) of every module, by its path."""
    return {
        path: (
            type(module),
            {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, int | float | str | tuple | None)
                and name not in IRRELEVANT
                and not name.startswith("_")  # PyTorch's own books: torch.compile(model) leaves a mark
            },
        )
        for path, module in model.named_modules()
    }


@cache
def _kinds_as_built(config: str) -> dict[str, tuple[type, dict[str, object]]]:
    """What `_kinds` says of a fresh network; config: its `config()` as JSON."""
    with torch.device("meta"):
        return _kinds(build_network(json.loads(config)))


def _is_plain_unet(model: nn.Module) -> bool:
    """Whether this is a ContextUnet as built: no subclass, nothing exchanged or set, no hook for folding to miss."""
    if type(model) is not ContextUnet:
        return False
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
    return not hooked and _kinds(model) == _kinds_as_built(json.dumps(model.config()))


Form = InferenceUnet | PlainForm
# Not of plain forms, which hold the network: as values they would keep their own key alive.
_forms: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, torch.device], InferenceUnet]] = WeakKeyDictionary()


def inference_form(model: nn.Module, dtype: torch.dtype) -> Form:
    """The network's inference form with its present weights; a ContextUnet's is kept, so compiling it is not lost.

    Only those of the device that the model is on, and until `release`. dtype: see `computed_in`.
    """
    device = next(model.parameters(), torch.empty(0)).device
    dtype = computed_in(dtype, device)
    if not _is_plain_unet(model):
        logger.info("nothing is folded: %s is no ContextUnet as built", type(model).__name__)
        return PlainForm(model, dtype)
    forms = _forms.setdefault(model, {})
    key = dtype, device
    for left in [other for other in forms if other[1] != key[1]]:
        del forms[left]
    if key in forms:
        forms[key].refresh(model)
    else:
        forms[key] = InferenceUnet(model, dtype)
        if device.type == "cpu" and dtype == torch.float32:
            _say_if_slow(forms[key], model)
    return forms[key]


def _say_if_slow(form: InferenceUnet, model: ContextUnet) -> None:
    if any(module.transformed for module in form.modules() if isinstance(module, Convolution)):
        return
    fitting = any(map(fits, model.parameters()))
    lack = missing() if fitting else f"no convolution has channels in multiples of {PANEL} (n_feat)"
    logger.info("convolutions are the library's, about a third as fast as the operator winograd: %s", lack)


def release(model: nn.Module) -> None:
    """Forget what was kept to sample this network: folded weights, compiled code, CUDA graphs and their memory."""
    _forms.pop(model, None)
