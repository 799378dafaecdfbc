"""convolution: the kernel and the reference against float64 mathematics, registration, bad input."""

import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from bench.kernels import TOLERANCE
from kernels import convolution
from kernels.backend import recording
from kernels.convolution import MOST_COLUMNS, MOST_ROWS, launch, operator, tile

LAST = torch.channels_last
# What the kernel takes: on CUDA float32 would spill.
TYPES = [torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]
many = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arguments(
    shape, columns, size=3, dtype=None, device="cpu", *, skip=None, films=(None, None), onto=False, **options
):
    """(x, weight, bias), keywords; skip: (images, channels); films: "rows", "one" or None for scale and shift."""
    n, channels, height, width = shape
    dtype = dtype or (TYPES[0] if device != "cpu" else torch.float32)
    generator = torch.Generator().manual_seed(sum(shape) + columns)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    inputs = size * size * (channels + (skip[1] if skip else 0))
    rows = {"rows": n, "one": 1}
    keywords = {
        "skip": randn(skip[0], skip[1], height, width) if skip else None,
        "skip_weight": randn(columns, skip[1], size, size) / math.sqrt(inputs) if skip else None,
        "film_scale": randn(rows[films[0]], columns) if films[0] else None,
        "film_shift": randn(rows[films[1]], columns) if films[1] else None,
        "onto": randn(n, columns, height, width) if onto else None,
    }
    weight = randn(columns, channels, size, size) / math.sqrt(inputs)
    return (randn(*shape), weight, randn(columns)), keywords | options


def mathematics(x, weight, bias, *, skip, skip_weight, film_scale, film_shift, onto, gelu=False, then="keep"):
    """The equations in float64: every tap is a shifted product over channels, nothing of torch's convolutions."""
    tensors = (x, weight, bias, skip, skip_weight, film_scale, film_shift, onto)
    tensors = [None if tensor is None else tensor.double().cpu() for tensor in tensors]
    x, weight, bias, skip, skip_weight, film_scale, film_shift, onto = tensors
    if skip is not None:
        x = torch.cat((x, skip.repeat(x.shape[0] // len(skip), 1, 1, 1)), 1)
        weight = torch.cat((weight, skip_weight), 1)
    _, _, height, width = x.shape
    size = weight.shape[-1]
    padded = torch.zeros(*x.shape[:2], height + size - 1, width + size - 1, dtype=torch.float64)
    padded[:, :, size // 2 : size // 2 + height, size // 2 : size // 2 + width] = x
    u = bias[:, None, None] + sum(
        torch.einsum("nchw,dc->ndhw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i in range(size)
        for j in range(size)
    )
    v = 0.5 * u * (1 + torch.erf(u / math.sqrt(2))) if gelu else u
    v = v if film_scale is None else v * film_scale[:, :, None, None]
    v = v if film_shift is None else v + film_shift[:, :, None, None]
    v = v if onto is None else v + onto
    if then == "pool":
        return torch.stack([v[:, :, i::2, j::2] for i in range(2) for j in range(2)]).amax(0)
    if then == "spread":
        out = torch.empty(v.shape[0], v.shape[1] // 4, 2 * height, 2 * width, dtype=torch.float64)
        for corner, part in enumerate(v.chunk(4, 1)):
            out[:, :, corner // 2 :: 2, corner % 2 :: 2] = part
        return out
    return v


def close(actual, expected, dtype, factor=1.0, layout=LAST):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=layout)
    error = (actual.double().cpu() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= factor * TOLERANCE[dtype], float(error.max())


@many
@given(
    n=st.sampled_from([1, 2, 4]),
    channels=st.sampled_from([1, 3, 16, 40]),
    columns=st.sampled_from([3, 16, 72]),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.sampled_from([1, 3]),
    dtype=st.sampled_from(TYPES),
    skip=st.sampled_from([None, (1, 8), (1, 19)]),
    films=st.sampled_from([(None, None), ("rows", "one"), ("one", "rows"), (None, "one")]),
    onto=st.booleans(),
    gelu=st.booleans(),
)
def test_the_kernel(triton_device, n, channels, columns, sides, size, dtype, skip, films, onto, gelu):
    positional, keywords = arguments(
        (n, channels, *sides), columns, size, dtype, triton_device, skip=skip, films=films, onto=onto, gelu=gelu
    )
    close(convolution(*positional, **keywords, kernel=True), mathematics(*positional, **keywords), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("then", ["pool", "spread"])
@pytest.mark.parametrize(("shape", "size"), [((2, 16, 4, 6), 3), ((2, 20, 4, 2), 1)])
def test_pooled_and_spread(triton_device, dtype, then, shape, size):
    for films in ((None, None), ("rows", "one")):
        positional, keywords = arguments(
            shape, 24, size, dtype, triton_device, skip=(1, 8), films=films, onto=True, gelu=True, then=then
        )
        close(convolution(*positional, **keywords, kernel=True), mathematics(*positional, **keywords), dtype)


def test_guided_halves_share_their_skip(triton_device):
    """Rows k n + i read image i of the skip."""
    positional, keywords = arguments((6, 16, 4, 4), 16, device=triton_device, skip=(3, 24))
    expected = mathematics(*positional, **keywords)
    close(convolution(*positional, **keywords, kernel=True), expected, TYPES[0])
    keywords["skip"] = keywords["skip"].roll(1, 0)
    assert (convolution(*positional, **keywords, kernel=True).double().cpu() - expected).abs().max() > 0.1


def test_nan_survives_pooling(triton_device):
    positional, keywords = arguments((1, 8, 4, 4), 8, device=triton_device, then="pool")
    positional[0][0, :, 1, 1] = math.nan
    for kernel in (False, True):
        assert convolution(*positional, **keywords, kernel=kernel)[0, :, 0, 0].isnan().all()


def test_vectors_are_read_with_their_strides(triton_device):
    positional, keywords = arguments((2, 8, 4, 4), 8, device=triton_device, films=("one", "one"))
    x, weight, bias = positional
    bias, keywords["film_scale"] = bias.repeat_interleave(2)[::2], keywords["film_scale"][:, :1].expand(1, 8)
    expected = mathematics(x, weight, bias, **keywords)
    close(convolution(x, weight, bias, **keywords, kernel=True), expected, TYPES[0])


def test_large_tiles(triton_device, monkeypatch):
    """As at large batches: a program takes the most rows, and the last one a rest."""
    # The function of this name hides the module.
    monkeypatch.setattr(sys.modules["kernels.convolution"], "PROGRAMS", 1)
    assert tile(200, 72) == (MOST_ROWS, MOST_COLUMNS)
    positional, keywords = arguments((2, 16, 10, 10), 72, dtype=torch.float16, device=triton_device, gelu=True)
    for then in ("keep", "pool"):
        actual = convolution(*positional, **keywords, then=then, kernel=True)
        close(actual, mathematics(*positional, **keywords, then=then), torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's tl.dot is wrong for bfloat16")
@pytest.mark.parametrize("then", ["keep", "pool"])
@pytest.mark.parametrize("shape", [(1, 64, 16, 16), (64, 64, 16, 16), (3, 128, 8, 8), (5, 3, 16, 16)])
def test_bfloat16(triton_device, shape, then):
    positional, keywords = arguments(shape, 64, 3, torch.bfloat16, triton_device, gelu=True, then=then)
    close(convolution(*positional, **keywords, kernel=True), mathematics(*positional, **keywords), torch.bfloat16)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("then", ["keep", "pool", "spread"])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 1)])
def test_the_library(monkeypatch, dtype, factor, then, kernel, layout):
    """By PyTorch's operators, each of which rounds, in x's layout: also where a kernel is asked for and cannot run."""
    monkeypatch.setattr("kernels.native.missing", lambda source: "a compiler")
    positional, keywords = arguments(
        (4, 12, 6, 4), 16, dtype=dtype, skip=(2, 8), films=("rows", "one"), onto=True, gelu=True, then=then
    )
    positional = (positional[0].contiguous(memory_format=layout), *positional[1:])
    actual = convolution(*positional, **keywords, kernel=kernel)
    close(actual, mathematics(*positional, **keywords), dtype, factor, layout)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_librarys_sum_with_a_shared_skip_is_exact(copies):
    """Bit for bit what the repeated skip gives."""
    positional, keywords = arguments((6, 16, 4, 4), 16, skip=(6 // copies, 24))
    repeated = keywords | {"skip": keywords["skip"].repeat(copies, 1, 1, 1)}
    assert torch.equal(convolution(*positional, **keywords), convolution(*positional, **repeated))


@pytest.mark.parametrize("kernel", [False, True])
def test_nothing_is_launched_without_images(triton_device, kernel):
    positional, keywords = arguments((0, 8, 4, 4), 8, device=triton_device, skip=(2, 4))
    assert convolution(*positional, **keywords, kernel=kernel).shape == (0, 8, 4, 4)


def test_contiguous_images_and_weights_are_read_as_channels_last(triton_device):
    positional, keywords = arguments((2, 8, 4, 4), 8, device=triton_device, onto=True)
    expected = convolution(*positional, **keywords, kernel=True)
    laid = [tensor.contiguous(memory_format=LAST) for tensor in positional[:2]]
    assert torch.equal(convolution(*laid, positional[2], **keywords, kernel=True), expected)


@pytest.mark.parametrize("where", ["triton_device", "cpu"])
@pytest.mark.parametrize("then", ["keep", "pool", "spread"])
def test_opcheck(request, then, where):
    device = "cpu" if where == "cpu" else request.getfixturevalue(where)
    torch.use_deterministic_algorithms(False)  # poisoned outputs differ where opcheck compares two calls
    (x, weight, bias), keywords = arguments((2, 8, 4, 4), 8, device=device, skip=(1, 8), films=("rows", "one"))
    tensors = (x, weight, bias, *keywords.values())
    torch.library.opcheck(torch.ops.fused_ddpm.convolution.default, (*tensors, True, then))


def test_one_launch(triton_device):
    positional, keywords = arguments((2, 8, 4, 4), 8, device=triton_device, skip=(1, 8), gelu=True, then="pool")
    with recording() as launches:
        convolution(*positional, **keywords, kernel=True)
    assert len(launches) == 1


GOOD = {"shape": (2, 8, 4, 4), "columns": 8, "skip": (1, 8), "films": ("rows", "one"), "onto": True}
WRONG = {
    "x of integers": (lambda p: (p[0].int(), *p[1:]), r"x: got torch.int32 \[2, 8, 4, 4\]"),
    "x of a row": (lambda p: (p[0][0], *p[1:]), r"x: got torch.float32 \[8, 4, 4\]"),
    "weight of other channels": (lambda p: (p[0], p[1][:, :4], p[2]), "x's weight: got"),
    "weight of another type": (lambda p: (p[0], p[1].half(), p[2]), "x's weight: got torch.float16"),
    "weight 2x2": (lambda p: (p[0], p[1][:, :, :2, :2], p[2]), "with k 1 or 3"),
    "bias too long": (lambda p: (*p[:2], torch.ones(9)), r"bias: got torch.float32 \[9\], needs"),
}
WRONG_KEYWORDS = {
    "skip alone": ({"skip_weight": None}, "skip and skip_weight: got one of them"),
    "skip of 3 images": ({"skip": torch.ones(3, 8, 4, 4)}, "skip: got 3 images"),
    "skip of another size": ({"skip": torch.ones(1, 8, 4, 6)}, "skip: got torch.float32"),
    "skip of other outputs": ({"skip_weight": torch.ones(4, 8, 3, 3)}, "skip: got 1 images and weight"),
    "scale of 3 rows": ({"film_scale": torch.ones(3, 8)}, r"film_scale: got torch.float32 \[3, 8\]"),
    "shift of another type": ({"film_shift": torch.ones(1, 8).half()}, "film_shift: got torch.float16"),
    "onto of another size": ({"onto": torch.ones(2, 8, 4, 5)}, "onto: got"),
    "unknown end": ({"then": "fold"}, "then: got 'fold', needs keep, pool or spread"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_tensors(name):
    change, message = WRONG[name]
    positional, keywords = arguments(**GOOD)
    with pytest.raises(ValueError, match=message):
        convolution(*change(positional), **keywords)


@pytest.mark.parametrize("name", WRONG_KEYWORDS)
def test_bad_keywords(name):
    change, message = WRONG_KEYWORDS[name]
    positional, keywords = arguments(**GOOD)
    with pytest.raises(ValueError, match=message):
        convolution(*positional, **keywords | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_takes_16_bits_on_cuda(dtype):
    """Asked of tensors without memory: products of float32 without tensor cores would spill."""
    with FakeTensorMode():
        x, weight = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((1, 8, 4, 4), (8, 8, 3, 3)))
        with pytest.raises(ValueError, match=f"x: got {dtype} on CUDA, needs float16 or bfloat16"):
            convolution(x, weight, kernel=True)


def test_bad_shapes_for_what_follows():
    positional, keywords = arguments((2, 8, 5, 4), 6)
    with pytest.raises(ValueError, match="needs even sides to pool"):
        convolution(*positional, **keywords, then="pool")
    with pytest.raises(ValueError, match="got 6 outputs, needs a multiple of 4"):
        convolution(*positional, **keywords, then="spread")


def test_a_launch_whose_offsets_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs fewer than 2\^31 elements"), torch.device("meta"):
        launch(torch.empty(1 << 20, 8, 16, 16), torch.empty(8, 8, 3, 3), *[None] * 6, False, "keep")


@pytest.mark.parametrize("name", [name for name in WRONG_KEYWORDS if "rows" in name or "images" in name])
def test_the_registered_operator_checks_sizes_that_tracing_did_not(name):
    change, message = WRONG_KEYWORDS[name]
    positional, keywords = arguments(**GOOD)
    with pytest.raises(ValueError, match=message):
        operator(*positional, *(keywords | change).values(), False, "keep")
