"""The kernel benchmark: every operator against the eager sequence it replaces and against a copy of the same bytes.

The eager sequence is what people write, `torch.randn_like` and elementwise operators. Parity is checked in float64, on
the same device: with the eager sequence, or, as its noise is another noise, with the operator's own reference.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from ddpm.metrics import elementwise, worst
from kernels import philox
from kernels.backend import Cost
from kernels.noise_mse import backward_operator
from kernels.philox import Stream
from kernels.winograd import missing, transform

TIMESTEPS = 500
SEED = 7
ROW = (3, 16, 16)
# Of every parity check and kernel test, relative to max(1, |reference|): rounding of the type plus the noise contract's
# 1e-5. float64 is of references only.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CHUNK_ROWS = 4096
SETS_MOST = 64
WINOGRAD = "winograd"


def operator_file(name: str) -> ModuleType:
    """`kernels/NAME.py`, which the package's function of this name hides: reference, launch and cost."""
    return import_module(f"kernels.{name}")


def times(each: Cost, elements: int) -> Cost:
    """Of so many elements."""
    return Cost(each.bytes * elements, each.flops * elements)


@dataclass(frozen=True)
class Workload:
    """One row of the kernel benchmark.

    elements, cost: of one call. make(k): the k-th arguments of fused and eager.
    exact: (rows, *arguments) -> what the operator's first outputs are in these rows, in float64.
    """

    name: str
    dtype: torch.dtype
    elements: int
    cost: Cost
    make: Callable[[int], tuple]
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    exact: Callable[..., Any]

    def error(self, arguments: tuple) -> float:
        """The parity error, in chunks of rows, which depend on nothing but themselves; a scalar is compared whole."""
        given = (value.clone() if isinstance(value, Tensor) else value for value in arguments)  # some work in place
        outputs = _tuple(self.fused(*given))
        errors = []
        for rows in _chunks(len(outputs[0])) if outputs[0].ndim else [...]:
            exact = _tuple(self.exact(rows, *arguments))
            errors += [elementwise(output[rows], expected) for output, expected in zip(outputs, exact, strict=False)]
        return worst(errors)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _chunks(n: int) -> Iterator[slice]:
    """All rows in chunks, so that references of 10^8 elements fit the device."""
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def _cache(device: torch.device) -> int:
    """Bytes of L2; 0 on the CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def sets_for(workload: Workload, device: torch.device) -> int:
    """How many argument sets rotate: enough to exceed twice the L2 cache on CUDA, at least four."""
    if device.type != "cuda":
        return 2
    return int(min(SETS_MOST, max(4, 2 * _cache(device) // workload.cost.bytes + 1)))


@contextmanager
def full_precision(convolutions: bool = True) -> Iterator[None]:
    """float32 in float32 on CUDA: with TF32 the eager sequence would compute something else, faster.

    convolutions: these too, not only products; False is what PyTorch's defaults give.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, not convolutions
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """All operators on about this many elements."""
    return image_workloads(elements, dtype, device) + network_workloads(elements, dtype, device)


def seeded(dtype: torch.dtype, device: torch.device, k: int, *shape: int) -> Tensor:
    """The k-th normals of a shape; images are channels_last."""
    values = torch.randn(shape, generator=torch.Generator(device).manual_seed(k), device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


# Those of the U-Net with n_feat 64 on 16x16 images: channels, of a second source, outputs, side, what follows.
CONVOLUTIONS = {
    "convolution": (64, 0, 64, 16, "keep"),
    "convolution first": (3, 0, 64, 16, "keep"),
    "convolution last": (64, 0, 3, 16, "keep"),
    "convolution pool": (128, 0, 128, 8, "pool"),
    "convolution two sources": (64, 64, 64, 16, "keep"),
    "convolution spread": (128, 128, 256, 4, "spread"),
}


def network_workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """Operators inside the U-Net with n_feat 64 on 16x16 images, channels_last; at most so many elements in or out.

    Convolutions (and winograd) only where their kernels run.
    """
    randn = partial(seeded, dtype, device)

    def row(
        name: str, cost: Cost, count: int, shapes: list[tuple | None], weights: list, fused: Callable, eager: Callable
    ) -> Workload:
        """shapes: of the first arguments, each [n, ...]. What is exact is eager in float64."""

        def make(k: int) -> tuple[Tensor | None, ...]:
            return (*(shape and randn(k + 1000 * i, *shape) for i, shape in enumerate(shapes)), *weights)

        def exact(rows: slice, *arguments: Tensor | None) -> Tensor:
            images, others = arguments[: len(shapes)], arguments[len(shapes) :]
            given = (*(value if value is None else value[rows] for value in images), *others)
            return eager(*(value if value is None else value.double() for value in given))

        return Workload(name, dtype, count, times(cost, count), make, fused, eager, exact)

    def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, 8, weight, bias))

    def eager_bottleneck(x: Tensor, up_weight: Tensor, up_bias: Tensor, *others: Tensor) -> Tensor:
        *affine, scale, shift = others
        up = F.conv_transpose2d(F.gelu(F.avg_pool2d(x, 4)), up_weight, up_bias, stride=4)
        return scale[:, :, None, None] * eager_norm(up, *affine) + shift[:, :, None, None]

    def convolution(name: str, channels: int, skipped: int, columns: int, side: int, then: str) -> Workload:
        n = max(1, elements // (max(channels + skipped, columns) * side**2))
        size = 1 if then == "spread" else 3
        scale = (size**2 * (channels + skipped)) ** -0.5
        skip_weight = randn(3, columns, skipped, size, size) * scale if skipped else None
        weights = [randn(1, columns, channels, size, size) * scale, randn(2, columns), skip_weight]
        shapes = [(n, channels, side, side), (n, skipped, side, side) if skipped else None]

        def run(x: Tensor, skip: Tensor | None, *others: Tensor | None, kernel: bool = False) -> Tensor:
            weight, bias, of_skip = others
            more = {"skip": skip, "skip_weight": of_skip, "gelu": not skipped and columns > 3}
            return kernels.convolution(x, weight, bias, then=then, kernel=kernel, **more)

        cost = operator_file("convolution").cost(dtype, channels + skipped, columns, size**2, then)
        return row(name, cost, n * columns * side**2, shapes, weights, partial(run, kernel=True), run)

    head, deep = (max(1, elements // (64 * 256)), 64, 16, 16), (max(1, elements // (128 * 16)), 128, 4, 4)
    of_head, of_deep = (math.prod(head), [head]), (math.prod(deep), [deep])
    affine = [randn(k, 64) for k in (1, 2)]
    # Gains around one, as in trained networks: they multiply what rounding the pooled vector to the type costs.
    film = [1 + randn(7, 1, 128) / 8, randn(8, 1, 128)]
    weights = [randn(3, 128, 128, 4, 4), randn(4, 128), 1 + randn(5, 128) / 8, randn(6, 128), *film]
    norm, middle = operator_file("group_norm_relu").cost(dtype), operator_file("bottleneck").cost(dtype, 128, deep[0])
    found = [
        row("group_norm_relu", norm, *of_head, affine, kernels.group_norm_relu, eager_norm),
        row("bottleneck", middle, *of_deep, weights, kernels.bottleneck, eager_bottleneck),
    ]
    if device.type == "cpu" and dtype == torch.float32 and missing() is None:
        weights = [randn(9, 64, 64, 3, 3) / 24, randn(10, 64)]
        transformed = transform(weights[0])
        cost = operator_file("winograd").cost(64, 64, 256, head[0])

        def fused(x: Tensor, _: Tensor, bias: Tensor) -> Tensor:
            return kernels.winograd(x, [transformed], [bias], gelu=True)

        def eager(*arguments: Tensor) -> Tensor:
            return F.gelu(F.conv2d(*arguments, padding=1))

        found.append(row(WINOGRAD, cost, *of_head, weights, fused, eager))
    # On tensor cores its products of float32 would be TF32, which it does not take: it is for 16-bit types there.
    shapes = {} if dtype == torch.float32 and device.type == "cuda" else CONVOLUTIONS
    return found + [convolution(name, *shape) for name, shape in shapes.items()]


def image_workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """Operators on images, [n, 3, 16, 16]."""
    n = max(1, elements // 768)
    alpha_bars = torch.linspace(1, 1e-3, TIMESTEPS + 1, device=device)
    samples = torch.arange(n, device=device)
    seed, index = torch.tensor(SEED, device=device), torch.tensor(0, device=device)
    c = [1.1, -0.4, 0.6, 0.4, 0.1, -0.2, 0.3, 250.0]
    table = torch.tensor([c], device=device)

    def draws(make: Callable[..., Tensor], k: int, *arguments: Any, **options: Any) -> Tensor:
        return make(*arguments, generator=torch.Generator(device).manual_seed(k), device=device, **options)

    images = max(n, 2 * _cache(device) // math.prod(ROW) + 1)  # gathered rows come from memory, not from L2
    data = draws(torch.randint, SEED, 0, 256, (images, *ROW), dtype=torch.uint8)

    def two(k: int) -> tuple[Tensor, Tensor]:
        return draws(torch.randn, k, (n, *ROW)).to(dtype), draws(torch.randn, k + 1000, (n, *ROW)).to(dtype)

    def contract(rows: slice, step: int = 0, stream: int = Stream.TRAINING_NOISE) -> Tensor:
        return philox.normal(SEED, samples[rows], step, stream, ROW, device=device, dtype=torch.float64)

    def q_sample(k: int) -> tuple:
        t = draws(torch.randint, k, 1, TIMESTEPS + 1, (n,))
        return draws(torch.randn, k, (n, *ROW)).to(dtype), t, alpha_bars, seed, samples, dtype

    def eager_diffusion(x0: Tensor, t: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        ab = alpha_bars[t].to(x0.dtype)[:, None, None, None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise, noise

    def exact_diffusion(rows: slice, x0: Tensor, t: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        noise = contract(rows)
        return operator_file("q_sample").reference(x0[rows].double(), t[rows], alpha_bars.double(), noise), noise

    def eager_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(1, TIMESTEPS + 1, (n,), device=device)
        return eager_diffusion((data[rows].float() / 127.5 - 1).to(dtype), t)

    def exact_rows(chunk: slice, rows: Tensor) -> tuple[Tensor, ...]:
        chosen = torch.tensor(SEED, device=device)
        given = (data, rows[chunk], alpha_bars.double(), chosen, samples[chunk], False, torch.float64)
        return operator_file("q_sample_rows").reference(*given)[:2]

    def exact_loss(_: slice, pred: Tensor, *others: Tensor) -> Tensor:
        """A mean over all rows, by chunks."""
        squares = [(pred[rows].double() - contract(rows)).square().sum() for rows in _chunks(n)]
        return torch.stack(squares).sum() / pred.numel()

    # Times the number of elements: of a mean's gradients nothing would be left to compare.
    grad = torch.tensor(float(n * 768), device=device)

    def eager_step(x: Tensor, m: Tensor) -> Tensor:
        x0 = c[0] * x + c[1] * m
        return c[2] * x + c[3] * x0 + c[4] * m + c[6] * torch.randn_like(x)

    def exact_step(rows: slice, x: Tensor, m: Tensor) -> Tensor:
        row, z = [float(value) for value in table[0]], contract(rows, 250, Stream.SAMPLING)
        return operator_file("solver_step").reference(x[rows].double(), m[rows].double(), row, z, None, None)[0]

    def eager_rescale(m: Tensor, m_uncond: Tensor) -> Tensor:
        guided, dims = m_uncond + 2.0 * (m - m_uncond), (1, 2, 3)
        rescaled = guided * (m.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return 0.7 * rescaled + (1 - 0.7) * guided

    def row(name: str, cost: tuple, *functions: Callable) -> Workload:
        of = operator_file(name.removesuffix("_backward")).cost
        return Workload(name, dtype, n * 768, times(of(*cost), n * 768), *functions)

    # The arguments of the operator's cost, what makes arguments, the operator, the eager sequence, what is exact.
    return [
        row("q_sample", (dtype, dtype), q_sample, kernels.q_sample, eager_diffusion, exact_diffusion),
        row(
            "q_sample_rows",
            (torch.uint8, dtype),
            lambda k: (draws(torch.randperm, k, images)[:n],),
            lambda rows: kernels.q_sample_rows(data, rows, alpha_bars, seed, samples, dtype=dtype),
            eager_rows,
            exact_rows,
        ),
        row("noise_mse", (dtype,), two, lambda pred, _: kernels.noise_mse(pred, seed, samples), F.mse_loss, exact_loss),
        row(
            "noise_mse_backward",
            (dtype, True),
            two,
            lambda pred, _: backward_operator(grad, pred, seed, samples, None),
            lambda pred, noise: (pred - noise) * 2.0,
            lambda rows, pred, _: 2 * (pred[rows].double() - contract(rows)),
        ),
        row(
            "solver_step",
            (dtype, dtype),
            two,
            lambda x, m: kernels.solver_step(x, m, table, index, seed, samples),
            eager_step,
            exact_step,
        ),
        row(
            "guidance_rescale",
            (dtype,),
            two,
            lambda m, uncond: kernels.guidance_rescale(m, uncond, 2.0, 0.7),
            eager_rescale,
            lambda rows, m, uncond: eager_rescale(m[rows].double(), uncond[rows].double()),
        ),
    ]
