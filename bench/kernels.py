"""The kernel benchmark: every operator against the eager sequence it replaces and against a copy of the same bytes.

The eager sequence is what people write, `torch.randn_like` and elementwise operators. Its noise is another noise, so
parity is checked against the operator's own reference, on the same device, and a row without parity has no ratio.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved, summary, timer
from ddpm.metrics import elementwise, worst
from kernels import bottleneck, convolution, group_norm_relu, philox, q_sample, q_sample_rows, solver_step, winograd
from kernels import noise_mse as noise_mse_function
from kernels.bottleneck import cost as bottleneck_cost
from kernels.bottleneck import reference as bottleneck_reference
from kernels.convolution import cost as convolution_cost
from kernels.group_norm_relu import cost as group_norm_cost
from kernels.group_norm_relu import reference as group_norm_reference
from kernels.noise_mse import backward_operator
from kernels.noise_mse import cost as noise_mse_cost
from kernels.noise_mse import reference as noise_mse_reference
from kernels.philox import Stream
from kernels.q_sample import cost as q_sample_cost
from kernels.q_sample import reference as q_sample_reference
from kernels.q_sample_rows import cost as rows_cost
from kernels.q_sample_rows import reference as rows_reference
from kernels.solver_step import cost as solver_cost
from kernels.solver_step import reference as solver_reference
from kernels.winograd import cost as winograd_cost
from kernels.winograd import missing, transform

TIMESTEPS = 500
SEED = 7
ROW = (3, 16, 16)
# Of every parity check and kernel test, relative to max(1, |reference|): rounding of the type plus the noise contract's
# 1e-5. float64 is of references only.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CHUNK_ROWS = 4096
SETS_MOST = 64


@dataclass(frozen=True)
class Workload:
    """One row of the kernel benchmark: `make(k)` gives the k-th argument set, `error(arguments)` the parity error."""

    name: str
    dtype: torch.dtype
    elements: int
    bytes: float
    make: Callable[[int], tuple]
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    error: Callable[[tuple], float]


def _worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest error of these pairs (actual, expected)."""
    return worst(elementwise(actual, expected) for actual, expected in pairs)


def _rows(n: int) -> Iterator[slice]:
    """All rows in chunks, so that references of 10^8 elements fit the device."""
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def _noise(samples: Tensor, step: int, stream: int) -> Tensor:
    return philox.normal(SEED, samples, step, stream, ROW, device=samples.device, dtype=torch.float64)


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

    def workload(name: str, channels: int, skipped: int, columns: int, side: int, then: str) -> Workload:
        n = max(1, elements // (max(channels + skipped, columns) * side**2))
        size = 1 if then == "spread" else 3
        inputs = size**2 * (channels + skipped)
        options = {"gelu": not skipped and columns > 3, "then": then}

        weight, bias = randn(1, columns, channels, size, size) / inputs**0.5, randn(2, columns)
        skip_weight = randn(3, columns, skipped, size, size) / inputs**0.5 if skipped else None

        def make(k: int) -> tuple[Tensor, ...]:
            return (randn(k, n, channels, side, side), *([randn(k + 1000, n, skipped, side, side)] if skipped else []))

        def run(x: Tensor, skip: Tensor | None = None, *, kernel: bool, kind: torch.dtype = dtype) -> Tensor:
            weights = (tensor if tensor is None else tensor.to(kind) for tensor in (weight, bias, skip_weight))
            of_x, added, of_skip = weights
            return convolution(x, of_x, added, skip=skip, skip_weight=of_skip, kernel=kernel, **options)

        def error(a: tuple[Tensor, ...]) -> float:
            out = run(*a, kernel=True)
            exact = partial(run, kernel=False, kind=torch.float64)
            return _worst((out[r], exact(*(tensor[r].double() for tensor in a))) for r in _rows(n))

        count = n * columns * side**2
        moved = convolution_cost(dtype, channels + skipped, columns, size**2, then).bytes * count
        return Workload(name, dtype, count, moved, make, partial(run, kernel=True), partial(run, kernel=False), error)

    # On tensor cores its products of float32 would be TF32, which it does not take: it is for 16-bit types there.
    shapes = {} if dtype == torch.float32 and device.type == "cuda" else CONVOLUTIONS
    return [workload(name, *shape) for name, shape in shapes.items()]


WINOGRAD = "winograd"


def network_workloads(elements: int, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    """Operators inside the U-Net with n_feat 64 on 16x16 images, channels_last: the out head, the bottleneck and,
    where its kernel runs, the convolution most frequent there.
    """

    randn = partial(normal, dtype, device)

    def error(fused: Callable, reference: Callable, a: tuple) -> float:
        """Rows depend on nothing but themselves, so the reference takes them in chunks."""
        out = fused(*a)
        return _worst((out[r], reference(a[0][r].double(), *(v.double() for v in a[1:]))) for r in _rows(len(out)))

    def workload(name: str, make: Callable, per_element: float, fused: Callable, reference: Callable, eager: Callable):  # noqa: ANN202
        count = make(0)[0].numel()
        return Workload(
            name, dtype, count, per_element * count, make, fused, eager, lambda a: error(fused, reference, a)
        )

    def eager_bottleneck(x: Tensor, up_weight: Tensor, up_bias: Tensor, *others: Tensor) -> Tensor:
        norm_weight, norm_bias, scale, shift = others
        up = F.conv_transpose2d(F.gelu(F.avg_pool2d(x, 4)), up_weight, up_bias, stride=4)
        return scale[:, :, None, None] * F.relu(F.group_norm(up, 8, norm_weight, norm_bias)) + shift[:, :, None, None]

    def eager_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.conv2d(x, weight, bias, padding=1))

    head, deep = max(1, elements // (64 * 256)), max(1, elements // (128 * 16))
    vectors = [randn(k, 64) for k in (1, 2)]
    # Gains around one, as in trained networks: they multiply what rounding the pooled vector to the type costs.
    film = [1 + randn(7, 1, 128) / 8, randn(8, 1, 128)]
    deep_weights = [randn(3, 128, 128, 4, 4), randn(4, 128), 1 + randn(5, 128) / 8, randn(6, 128), *film]
    found = [
        workload(
            "group_norm_relu",
            lambda k: (randn(k, head, 64, 16, 16), *vectors),
            group_norm_cost(dtype).bytes,
            group_norm_relu,
            lambda *a: group_norm_reference(*a, 8, 1e-5, None, None),
            lambda x, weight, bias: F.relu(F.group_norm(x, 8, weight, bias)),
        ),
        workload(
            "bottleneck",
            lambda k: (randn(k, deep, 128, 4, 4), *deep_weights),
            bottleneck_cost(dtype, 128, deep).bytes,
            bottleneck,
            lambda *a: bottleneck_reference(*a, 8, 1e-5),
            eager_bottleneck,
        ),
    ]
    if device.type == "cpu" and dtype == torch.float32 and missing() is None:
        conv_weights = [randn(9, 64, 64, 3, 3) / 24, randn(10, 64)]
        transformed = transform(conv_weights[0])
        found.append(
            workload(
                WINOGRAD,
                lambda k: (randn(k, head, 64, 16, 16), *conv_weights),
                winograd_cost(64, 64, 256, head).bytes,
                lambda x, _, bias: winograd(x, [transformed], [bias], gelu=True),
                eager_convolution,
                eager_convolution,
            )
        )
    return found


def image_workloads(elements: int, dtype: torch.dtype, device: torch.device, data_rows: int) -> list[Workload]:
    """Operators on images, [n, 3, 16, 16]."""
    n = max(1, elements // 768)
    alpha_bars = torch.linspace(1, 1e-3, TIMESTEPS + 1, device=device)
    samples = torch.arange(n, device=device)
    seed, index = torch.tensor(SEED, device=device), torch.tensor(0, device=device)
    coefficients = [1.1, -0.4, 0.6, 0.4, 0.1, -0.2, 0.3, 250.0]
    table = torch.tensor([coefficients], device=device)
    one = torch.ones((), device=device)

    def randn(k: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn((n, *ROW), generator=torch.Generator(device).manual_seed(k), device=device).to(kind)

    def times(k: int) -> Tensor:
        return torch.randint(1, TIMESTEPS + 1, (n,), generator=torch.Generator(device).manual_seed(k), device=device)

    def diffuse(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        ab = alpha_bars[t].to(x0.dtype)[:, None, None, None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise, noise

    def q_error(a: tuple) -> float:
        x_t, noise = q_sample(*a)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for r in _rows(n):
                z = _noise(samples[r], 0, Stream.TRAINING_NOISE)
                yield noise[r], z
                yield x_t[r], q_sample_reference(a[0][r].double(), a[1][r], alpha_bars.double(), z)

        return _worst(pairs())

    generator = torch.Generator(device).manual_seed(SEED)
    images = max(n, data_rows)
    data = torch.randint(0, 256, (images, *ROW), generator=generator, dtype=torch.uint8, device=device)

    def rows_eager(rows: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(1, TIMESTEPS + 1, (n,), device=device)
        return diffuse((data[rows].float() / 127.5 - 1).to(dtype), t)

    def rows_error(a: tuple) -> float:
        x_t, t, _ = q_sample_rows(data, a[0], alpha_bars, seed, samples, dtype=dtype)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for r in _rows(n):
                double = alpha_bars.double()
                x, expected_t, _ = rows_reference(data, a[0][r], double, seed, samples[r], False, torch.float64)
                yield x_t[r], x
                yield t[r], expected_t

        return _worst(pairs())

    def loss_error(a: tuple) -> float:
        parts = [
            noise_mse_reference(a[0][r].double(), _noise(samples[r], 0, Stream.TRAINING_NOISE)) * (r.stop - r.start)
            for r in _rows(n)
        ]
        return elementwise(noise_mse_function(a[0], seed, samples), torch.stack(parts).sum() / n)

    def gradient_error(a: tuple) -> float:
        scale = a[0].numel()
        gradient = backward_operator(one * scale, a[0], seed, samples, None)
        return _worst(
            (gradient[r], 2 * (a[0][r].double() - _noise(samples[r], 0, Stream.TRAINING_NOISE))) for r in _rows(n)
        )

    def mse_backward(pred: Tensor, noise: Tensor) -> Tensor:
        return (pred - noise) * (2 / pred.numel())

    def step_eager(x: Tensor, m: Tensor) -> Tensor:
        x0 = coefficients[0] * x + coefficients[1] * m
        return coefficients[2] * x + coefficients[3] * x0 + coefficients[4] * m + coefficients[6] * torch.randn_like(x)

    def step_error(a: tuple) -> float:
        x, m = a
        new = solver_step(x.clone(), m, table, index, seed, samples)
        row = [float(value) for value in table[0]]
        return _worst(
            (
                new[r],
                solver_reference(
                    x[r].double(), m[r].double(), row, _noise(samples[r], 250, Stream.SAMPLING), None, None
                )[0],
            )
            for r in _rows(n)
        )

    count = n * 768

    def workload(name: str, per_element: float, make: Callable, fused: Callable, eager: Callable, error: Callable):  # noqa: ANN202
        return Workload(name, dtype, count, per_element * count, make, fused, eager, error)

    return [
        workload(
            "q_sample",
            q_sample_cost(dtype, dtype).bytes,
            lambda k: (randn(k), times(k), alpha_bars, seed, samples, dtype),
            q_sample,
            lambda x0, t, *_: diffuse(x0, t),
            q_error,
        ),
        workload(
            "q_sample_rows",
            rows_cost(torch.uint8, dtype).bytes,
            lambda k: (torch.randperm(images, generator=torch.Generator(device).manual_seed(k), device=device)[:n],),
            lambda rows: q_sample_rows(data, rows, alpha_bars, seed, samples, dtype=dtype),
            rows_eager,
            rows_error,
        ),
        workload(
            "noise_mse",
            noise_mse_cost(dtype).bytes,
            lambda k: (randn(k), randn(k + 1000)),
            lambda pred, _: noise_mse_function(pred, seed, samples),
            F.mse_loss,
            loss_error,
        ),
        workload(
            "noise_mse_backward",
            noise_mse_cost(dtype, backward=True).bytes,
            lambda k: (randn(k), randn(k + 1000)),
            lambda pred, _: backward_operator(one, pred, seed, samples, None),
            mse_backward,
            gradient_error,
        ),
        workload(
            "solver_step",
            solver_cost(dtype, dtype).bytes,
            lambda k: (randn(k), randn(k + 1000)),
            lambda x, m: solver_step(x, m, table, index, seed, samples),
            step_eager,
            step_error,
        ),
    ]


def sets_for(workload: Workload, device: torch.device) -> int:
    """How many argument sets rotate: enough to exceed twice the L2 cache on CUDA, at least four."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(SETS_MOST, max(4, 2 * cache // workload.bytes + 1)))


@full_precision()
def measure(workload: Workload, device: torch.device, rounds: int) -> dict[str, Any]:
    """One record: parity first; without it there is no ratio. TF32 is off meanwhile."""
    sets = [workload.make(k) for k in range(sets_for(workload, device))]
    error = workload.error(sets[0])
    parity = error <= TOLERANCE[workload.dtype]
    record = {
        "kernel": workload.name,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "tf32": False,
        "elements": workload.elements,
        "bytes": workload.bytes,
        "error": error,
        "tolerance": TOLERANCE[workload.dtype],
        "parity": parity,
    }
    if not parity:
        return record
    half = max(1, int(workload.bytes // 2))
    buffers = [
        (torch.empty(half, dtype=torch.uint8, device=device), torch.empty(half, dtype=torch.uint8, device=device))
        for _ in sets
    ]
    candidates = {
        "fused": (workload.fused, sets),
        "eager": (workload.eager, sets),
        "copy": (lambda to, source: to.copy_(source), buffers),
    }
    timers = {name: timer(call, rotated, device, capturable=True) for name, (call, rotated) in candidates.items()}
    for warm_up in timers.values():
        warm_up()
    samples = interleaved(timers, rounds)
    record |= {
        "kernel_us": summary(samples["fused"]["kernel"]),
        "wall_us": summary(samples["fused"]["wall"]),
        "eager_us": summary(samples["eager"]["kernel"]),
        "eager_wall_us": summary(samples["eager"]["wall"]),
        "copy_us": summary(samples["copy"]["kernel"]),
    }
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    time = record["kernel_us"]["median"]
    record |= {
        # Small tensors stay in the cache however many sets rotate; the copy beside them does too.
        "cold": workload.bytes * len(sets) > 2 * cache,
        "gb_per_s": workload.bytes / time / 1e3,
        "share_of_copy": record["copy_us"]["median"] / time,
        "ratio_to_eager": record["eager_us"]["median"] / time,
    }
    return record
