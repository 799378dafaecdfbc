"""The kernel benchmark: every operator against the eager sequence it replaces and against a copy of the same bytes.

The eager sequence is what people write, `torch.randn_like` and elementwise operators. Its noise is another noise, so
parity is checked against the operator's own reference, on the same device, and a row without parity has no ratio.
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


@dataclass(frozen=True)
class Workload:
    """One row of the kernel benchmark.

    elements: of one call; per_element: its cost for each. make(k): the k-th arguments of fused and eager.
    exact: (rows, *arguments) -> what the operator's outputs are in these rows, in float64. judged: what is compared
    with it, default `fused`.
    """

    name: str
    dtype: torch.dtype
    elements: int
    per_element: Cost
    make: Callable[[int], tuple]
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    exact: Callable[..., Any]
    judged: Callable[..., Any] | None = None

    @property
    def cost(self) -> Cost:
        """Of one call."""
        return Cost(self.per_element.bytes * self.elements, self.per_element.flops * self.elements)

    def error(self, arguments: tuple) -> float:
        """The parity error, in chunks of rows, which depend on nothing but themselves; a scalar is compared whole."""
        outputs = _tuple((self.judged or self.fused)(*arguments))
        chunks = _rows(len(outputs[0])) if outputs[0].ndim else [...]
        errors = []
        for rows in chunks:
            exact = _tuple(self.exact(rows, *arguments))  # of the first outputs; the noise behind them may be left out
            errors += [elementwise(outputs[k][rows], expected) for k, expected in enumerate(exact)]
        return worst(errors)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _rows(n: int) -> Iterator[slice]:
    """All rows in chunks, so that references of 10^8 elements fit the device."""
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def data_set_rows(device: torch.device) -> int:
    """Images of a data set of twice the L2 cache, so that gathered rows come from memory; 1 on the CPU.

    Fewer where they would take more than a quarter of the free memory.
    """
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(wanted, free // 4) // math.prod(ROW)) + 1


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


def workloads(elements: int, dtype: torch.dtype, device: torch.device, data_rows: int | None = None) -> list[Workload]:
    """All operators on about this many elements; data_rows: images of the data set, default `data_set_rows`."""
    return [
        *image_workloads(elements, dtype, device, data_set_rows(device) if data_rows is None else data_rows),
        *network_workloads(elements, dtype, device),
        *convolution_workloads(elements, dtype, device),
    ]


def normal(dtype: torch.dtype, device: torch.device, k: int, *shape: int) -> Tensor:
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


def convolution_workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """The kernel against the library's convolution and the operators after it; at most so many elements in or out."""
    randn = partial(normal, dtype, device)

    def row(name: str, channels: int, skipped: int, columns: int, side: int, then: str) -> Workload:
        n = max(1, elements // (max(channels + skipped, columns) * side**2))
        size = 1 if then == "spread" else 3
        scale = (size**2 * (channels + skipped)) ** -0.5
        weight, bias = randn(1, columns, channels, size, size) * scale, randn(2, columns)
        skip_weight = randn(3, columns, skipped, size, size) * scale if skipped else None

        def make(k: int) -> tuple[Tensor, ...]:
            return (randn(k, n, channels, side, side), *([randn(k + 1000, n, skipped, side, side)] if skipped else []))

        def run(x: Tensor, skip: Tensor | None = None, *, kernel: bool) -> Tensor:
            of_x, added, of_skip = (each if each is None else each.to(x.dtype) for each in (weight, bias, skip_weight))
            more = {"skip": skip, "skip_weight": of_skip, "gelu": not skipped and columns > 3}
            return kernels.convolution(x, of_x, added, then=then, kernel=kernel, **more)

        def exact(rows: slice, *sources: Tensor) -> Tensor:
            return run(*(source[rows].double() for source in sources), kernel=False)

        cost = operator_file("convolution").cost(dtype, channels + skipped, columns, size**2, then)
        kernel, library = partial(run, kernel=True), partial(run, kernel=False)
        return Workload(name, dtype, n * columns * side**2, cost, make, kernel, library, exact)

    # On tensor cores its products of float32 would be TF32, which it does not take: it is for 16-bit types there.
    shapes = {} if dtype == torch.float32 and device.type == "cuda" else CONVOLUTIONS
    return [row(name, *shape) for name, shape in shapes.items()]


def _eager_bottleneck(x: Tensor, up_weight: Tensor, up_bias: Tensor, *others: Tensor) -> Tensor:
    norm_weight, norm_bias, scale, shift = others
    up = F.conv_transpose2d(F.gelu(F.avg_pool2d(x, 4)), up_weight, up_bias, stride=4)
    return scale[:, :, None, None] * F.relu(F.group_norm(up, 8, norm_weight, norm_bias)) + shift[:, :, None, None]


def _eager_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias, padding=1))


def network_workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """Operators inside the U-Net with n_feat 64 on 16x16 images, channels_last: the out head, the bottleneck and,
    where its kernel runs, the convolution most frequent there.
    """
    randn = partial(normal, dtype, device)
    norm, middle = operator_file("group_norm_relu"), operator_file("bottleneck")

    def row(name: str, cost: Cost, sizes: tuple, weights: list, fused: Callable, eager: Callable, reference: Callable):  # noqa: ANN202
        def exact(rows: slice, x: Tensor, *others: Tensor) -> Tensor:
            return reference(x[rows].double(), *(other.double() for other in others))

        count = math.prod(sizes)
        return Workload(name, dtype, count, cost, lambda k: (randn(k, *sizes), *weights), fused, eager, exact)

    def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, 8, weight, bias))

    def exact_norm(*a: Tensor) -> Tensor:
        return norm.reference(*a, 8, 1e-5, None, None)

    def exact_bottleneck(*a: Tensor) -> Tensor:
        return middle.reference(*a, 8, 1e-5)

    head, deep = (max(1, elements // (64 * 256)), 64, 16, 16), (max(1, elements // (128 * 16)), 128, 4, 4)
    affine = [randn(k, 64) for k in (1, 2)]
    # Gains around one, as in trained networks: they multiply what rounding the pooled vector to the type costs.
    film = [1 + randn(7, 1, 128) / 8, randn(8, 1, 128)]
    weights = [randn(3, 128, 128, 4, 4), randn(4, 128), 1 + randn(5, 128) / 8, randn(6, 128), *film]
    cost = middle.cost(dtype, 128, deep[0])
    found = [
        row("group_norm_relu", norm.cost(dtype), head, affine, kernels.group_norm_relu, eager_norm, exact_norm),
        row("bottleneck", cost, deep, weights, kernels.bottleneck, _eager_bottleneck, exact_bottleneck),
    ]
    if device.type == "cpu" and dtype == torch.float32 and missing() is None:
        weights = [randn(9, 64, 64, 3, 3) / 24, randn(10, 64)]
        transformed = transform(weights[0])

        def fused(x: Tensor, _: Tensor, bias: Tensor) -> Tensor:
            return kernels.winograd(x, [transformed], [bias], gelu=True)

        cost = operator_file("winograd").cost(64, 64, 256, head[0])
        found.append(row(WINOGRAD, cost, head, weights, fused, _eager_convolution, _eager_convolution))
    return found


def image_workloads(elements: int, dtype: torch.dtype, device: torch.device, data_rows: int) -> list[Workload]:
    """Operators on images, [n, 3, 16, 16]."""
    n = max(1, elements // 768)
    alpha_bars = torch.linspace(1, 1e-3, TIMESTEPS + 1, device=device)
    samples = torch.arange(n, device=device)
    seed, index = torch.tensor(SEED, device=device), torch.tensor(0, device=device)
    one = torch.ones((), device=device)
    c = [1.1, -0.4, 0.6, 0.4, 0.1, -0.2, 0.3, 250.0]
    table = torch.tensor([c], device=device)

    def seeded(make: Callable[..., Tensor], k: int, *arguments: Any, **options: Any) -> Tensor:
        return make(*arguments, generator=torch.Generator(device).manual_seed(k), device=device, **options)

    images = max(n, data_rows)
    data = seeded(torch.randint, SEED, 0, 256, (images, *ROW), dtype=torch.uint8)

    def two(k: int) -> tuple[Tensor, Tensor]:
        return seeded(torch.randn, k, (n, *ROW)).to(dtype), seeded(torch.randn, k + 1000, (n, *ROW)).to(dtype)

    def contract(rows: slice, step: int = 0, stream: int = Stream.TRAINING_NOISE) -> Tensor:
        return philox.normal(SEED, samples[rows], step, stream, ROW, device=device, dtype=torch.float64)

    def q_sample(k: int) -> tuple:
        t = seeded(torch.randint, k, 1, TIMESTEPS + 1, (n,))
        return seeded(torch.randn, k, (n, *ROW)).to(dtype), t, alpha_bars, seed, samples, dtype

    def eager_diffusion(x0: Tensor, t: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        ab = alpha_bars[t].to(x0.dtype)[:, None, None, None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise, noise

    def exact_diffusion(rows: slice, x0: Tensor, t: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        noise = contract(rows)
        return operator_file("q_sample").reference(x0[rows].double(), t[rows], alpha_bars.double(), noise), noise

    def q_sample_rows(rows: Tensor) -> tuple:
        return kernels.q_sample_rows(data, rows, alpha_bars, seed, samples, dtype=dtype)

    def eager_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(1, TIMESTEPS + 1, (n,), device=device)
        return eager_diffusion((data[rows].float() / 127.5 - 1).to(dtype), t)

    def exact_rows(chunk: slice, rows: Tensor) -> tuple[Tensor, ...]:
        chosen = torch.tensor(SEED, device=device)
        given = (data, rows[chunk], alpha_bars.double(), chosen, samples[chunk], False, torch.float64)
        return operator_file("q_sample_rows").reference(*given)[:2]

    def loss(pred: Tensor, _: Tensor) -> Tensor:
        return kernels.noise_mse(pred, seed, samples)

    def exact_loss(_: slice, pred: Tensor, *others: Tensor) -> Tensor:
        """A mean over all rows, by chunks."""
        mean = operator_file("noise_mse").reference
        parts = [mean(pred[rows].double(), contract(rows)) * (rows.stop - rows.start) for rows in _rows(n)]
        return torch.stack(parts).sum() / n

    def gradient(pred: Tensor, _: Tensor, scale: float = 1.0) -> Tensor:
        return backward_operator(one * scale, pred, seed, samples, None)

    def eager_gradient(pred: Tensor, noise: Tensor) -> Tensor:
        return (pred - noise) * (2 / pred.numel())

    def exact_gradient(rows: slice, pred: Tensor, _: Tensor) -> Tensor:
        """Times the number of elements, as what is judged."""
        return 2 * (pred[rows].double() - contract(rows))

    def step(x: Tensor, m: Tensor) -> Tensor:
        return kernels.solver_step(x, m, table, index, seed, samples)

    def eager_step(x: Tensor, m: Tensor) -> Tensor:
        x0 = c[0] * x + c[1] * m
        return c[2] * x + c[3] * x0 + c[4] * m + c[6] * torch.randn_like(x)

    def exact_step(rows: slice, x: Tensor, m: Tensor) -> Tensor:
        row, z = [float(value) for value in table[0]], contract(rows, 250, Stream.SAMPLING)
        return operator_file("solver_step").reference(x[rows].double(), m[rows].double(), row, z, None, None)[0]

    def row(name: str, cost: tuple, *others: Any, judged: Callable | None = None) -> Workload:
        of = operator_file(name.removesuffix("_backward")).cost
        return Workload(name, dtype, n * 768, of(*cost), *others, judged=judged)

    # The arguments of the operator's cost, what makes arguments, the operator, the eager sequence, what is exact.
    return [
        row("q_sample", (dtype, dtype), q_sample, kernels.q_sample, eager_diffusion, exact_diffusion),
        row(
            "q_sample_rows",
            (torch.uint8, dtype),
            lambda k: (seeded(torch.randperm, k, images)[:n],),
            q_sample_rows,
            eager_rows,
            exact_rows,
        ),
        row("noise_mse", (dtype,), two, loss, F.mse_loss, exact_loss),
        row(
            "noise_mse_backward",
            (dtype, True),
            two,
            gradient,
            eager_gradient,
            exact_gradient,
            judged=lambda pred, _: gradient(pred, _, pred.numel()),
        ),
        row("solver_step", (dtype, dtype), two, step, eager_step, exact_step, judged=lambda x, m: step(x.clone(), m)),
    ]


def sets_for(workload: Workload, device: torch.device) -> int:
    """How many argument sets rotate: enough to exceed twice the L2 cache on CUDA, at least four."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(SETS_MOST, max(4, 2 * cache // workload.cost.bytes + 1)))
