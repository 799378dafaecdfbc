"""bottleneck: the reference, the kernel against float64 mathematics, registration, bad input."""

import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.kernels import TOLERANCE
from ddpm.networks import ContextUnet
from kernels import bottleneck, native
from kernels.backend import recording
from kernels.bottleneck import SOURCE
from kernels.group_norm_relu import in_cpp

# The normalisation multiplies the rounding before it: up to sqrt(1 / eps) in a group of two values that are nearly
# equal.
AMPLIFIED = 5
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}

shapes = st.one_of(
    st.tuples(st.integers(1, 3), st.sampled_from([8, 16, 24, 40]), st.integers(1, 8)),
    # No images; two tiles of images; networks of 16x16, 28x28 and 64x64 (n_feat 64, 32, 64: the last in two kernels).
    st.sampled_from([(0, 8, 4), (17, 16, 2), (33, 8, 3), (3, 128, 4), (2, 64, 7), (2, 256, 8)]),
)
many = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arguments(shape, dtype=torch.float32, layouts=(True, True), films=("rows", "one"), device="cpu"):
    """All tensors on the device; layouts: are x and up_weight channels_last; films: "rows", "one" or None.

    The scale may also be (copies, "rows" or "one").
    """
    n, channels, side = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    x = (2 * randn(n, channels, side, side)).to(dtype).contiguous(memory_format=LAYOUTS[layouts[0]])
    up_weight = (randn(channels, channels, side, side) / 2).to(dtype).contiguous(memory_format=LAYOUTS[layouts[1]])
    vectors = [randn(channels).to(dtype) for _ in range(3)]
    rows = {"rows": n, "one": 1}
    copies, film = films[0] if isinstance(films[0], tuple) else (None, films[0])
    scale = None if film is None else randn(*([copies] if copies else []), rows[film], channels).to(dtype)
    shift = randn(rows[films[1]], channels).to(dtype)
    return [None if tensor is None else tensor.to(device) for tensor in (x, up_weight, *vectors, scale, shift)]


def mathematics(x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift, groups=8, eps=1e-5):
    """The equations in float64, written out; the pooled vector is rounded to x's type as the operator documents."""
    dtype = x.dtype
    tensors = (x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift)
    tensors = [None if tensor is None else tensor.double().cpu() for tensor in tensors]
    x, up_weight, up_bias, norm_weight, norm_bias, film_scale, film_shift = tensors
    mean = x.mean((2, 3))
    pooled = (0.5 * mean * (1 + torch.erf(mean / math.sqrt(2)))).to(dtype).double()
    up = torch.einsum("nk,kchw->nchw", pooled, up_weight) + up_bias[:, None, None]
    grouped = up.unflatten(1, (groups, -1)).flatten(3)
    apart = grouped - grouped.mean((2, 3), keepdim=True)
    normal = (apart / (apart.square().mean((2, 3), keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = (normal * norm_weight[:, None, None] + norm_bias[:, None, None]).clamp(min=0)
    scales = [None] if film_scale is None else [film_scale] if film_scale.ndim == 2 else film_scale
    copies = [y if scale is None else scale[:, :, None, None] * y for scale in scales]
    return torch.cat([copy + film_shift[:, :, None, None] for copy in copies])


def close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    if expected.numel():
        error = (actual.double().cpu() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() <= AMPLIFIED * TOLERANCE[dtype], float(error.max())


@many
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.float16]),
    layouts=st.tuples(st.booleans(), st.booleans()),
    films=st.sampled_from(
        [
            *(("rows", "one"), ("rows", "rows"), ("one", "rows"), (None, "one"), (None, "rows")),
            *(((1, "rows"), "one"), ((2, "rows"), "rows"), ((3, "one"), "one")),
        ]
    ),
)
def test_the_kernel(triton_device, shape, dtype, layouts, films):
    given = arguments(shape, dtype, layouts, films, triton_device)
    y = bottleneck(*given)
    close(y, mathematics(*given), dtype)
    if len(y):  # no images have no layout
        assert y.is_contiguous(memory_format=LAYOUTS[layouts[0]])


@pytest.mark.skipif(native.missing(SOURCE) is not None, reason=str(native.missing(SOURCE)))
@pytest.mark.parametrize("films", [(None, "one"), ("rows", "rows"), ("one", "one"), ((2, "rows"), "one")])
@pytest.mark.parametrize("shape", [(1, 128, 4), (3, 8, 5), (5, 40, 1), (2, 24, 3), (17, 16, 2), (9, 96, 2)])
def test_in_cpp(poisoned, monkeypatch, shape, films):
    """Channels last; the same bits on any number of threads, and for an image of a batch as alone."""
    given = arguments(shape, films=films)
    assert in_cpp(SOURCE, *given)
    y = bottleneck(*given)
    close(y, mathematics(*given), torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(bottleneck(*given), y)
    x, *others, scale, shift = given
    if films in ((None, "one"), ("one", "one")):
        assert torch.equal(bottleneck(x[:1], *others, scale, shift), y[:1])


@pytest.mark.parametrize(
    ("layouts", "films"),
    [
        ((True, True), ("rows", "one")),
        ((True, False), (None, "rows")),
        ((False, True), (None, "rows")),
        ((False, False), ("rows", "one")),
    ],
)
@pytest.mark.parametrize(("channels", "dtype"), [(64, torch.float32), (256, torch.float32), (256, torch.float16)])
def test_groups_too_wide_for_registers_take_group_norm_relu(triton_device, channels, dtype, layouts, films):
    given = arguments((2, channels, 8), dtype, layouts, films, triton_device)
    close(bottleneck(*given), mathematics(*given), dtype)
    with recording() as recorded:
        bottleneck(*given)
    (launch,) = recorded
    assert launch.kernel.fn.__name__ == ("bottleneck_kernel" if channels == 64 else "group_norm_relu_kernel")


@pytest.mark.parametrize("where", ["triton_device", "cpu"])
@pytest.mark.parametrize("rows", ["rows", "one"])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 4), (2, 256, 8)])
def test_copies_are_calls_with_their_scales(request, where, shape, copies, rows):
    """Bit for bit, the images of the first copy first; the second shape takes group_norm_relu's kernel."""
    device = "cpu" if where == "cpu" else request.getfixturevalue(where)
    *others, scales, shift = arguments(shape, films=((copies, rows), "rows"), device=device)
    y = bottleneck(*others, scales, shift)
    assert torch.equal(y, torch.cat([bottleneck(*others, scale, shift) for scale in scales]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    if where == "triton_device":
        with recording() as launches:
            bottleneck(*others, scales, shift)
        assert len(launches) == copies


@pytest.mark.parametrize(("groups", "eps"), [(1, 1e-5), (3, 0.1), (24, 1e-3)])
def test_groups_and_eps(triton_device, groups, eps):
    given = arguments((2, 24, 3), device=triton_device)
    close(bottleneck(*given, groups, eps), mathematics(*given, groups, eps), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's tl.dot is wrong for bfloat16")
@pytest.mark.parametrize("shape", [(3, 128, 4), (17, 128, 7), (2, 256, 8)])
def test_bfloat16(triton_device, shape):
    given = arguments(shape, torch.bfloat16, device=triton_device)
    close(bottleneck(*given), mathematics(*given), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="9 GiB of device memory")
def test_offsets_beyond_2_to_the_31(triton_device):
    n = 2**20 + 3
    x, *others = arguments((4, 128, 4), torch.bfloat16, films=("one", "one"), device=triton_device)
    many_images = torch.zeros(n, 128, 4, 4, dtype=x.dtype, device=x.device).contiguous(memory_format=LAYOUTS[True])
    many_images[-4:] = x
    close(bottleneck(many_images, *others)[-4:], mathematics(x, *others), torch.bfloat16)


@pytest.mark.parametrize("films", [("rows", "one"), (None, "rows"), ((2, "rows"), "one")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_on_the_cpu(monkeypatch, dtype, channels_last, films):
    monkeypatch.setattr(sys.modules["kernels.bottleneck"], "in_cpp", lambda *_: False)
    given = arguments((3, 24, 3), dtype, (channels_last, channels_last), films)
    y = bottleneck(*given)
    close(y, mathematics(*given), dtype)
    assert y.is_contiguous(memory_format=LAYOUTS[channels_last])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_of_narrow_types_computes_in_float32_and_rounds_once(monkeypatch, dtype):
    monkeypatch.setattr(sys.modules["kernels.bottleneck"], "in_cpp", lambda *_: False)
    given = arguments((3, 24, 3), dtype)
    assert torch.equal(bottleneck(*given), bottleneck(*(tensor.float() for tensor in given)).to(dtype))


def network(height, n_cfeat):
    torch.manual_seed(height)
    model = ContextUnet(3, n_feat=8, n_cfeat=n_cfeat, height=height).eval()
    torch.nn.init.normal_(model.up0[1].weight)
    torch.nn.init.normal_(model.up0[1].bias)
    return model


@pytest.mark.parametrize(("height", "n_cfeat"), [(16, 5), (28, 5), (64, 5), (16, 0)])
def test_it_is_what_the_network_computes(triton_device, height, n_cfeat):
    model = network(height, n_cfeat)
    conv, norm, _ = model.up0
    x = torch.randn(3, conv.in_channels, *conv.kernel_size)
    t, c = torch.tensor([0.1, 0.5, 1.0]), torch.randn(3, n_cfeat) if n_cfeat else None
    with torch.no_grad():
        expected = model._gate(1, model.up0(model.to_vec(x)), t, c)
        given = (
            x,
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            model.contextembed1(c) if n_cfeat else None,
            model.timeembed1(t),
        )
        y = bottleneck(*(None if tensor is None else tensor.to(triton_device) for tensor in given))
    torch.testing.assert_close(y.cpu(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("films", [("rows", "one"), (None, "rows"), ((1, "rows"), "one"), ((2, "rows"), "one")])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_opcheck(n, films):
    torch.library.opcheck(torch.ops.fused_ddpm.bottleneck.default, (*arguments((n, 16, 3), films=films), 8, 1e-5))


@pytest.mark.parametrize("films", [("rows", "one"), ((2, "rows"), "one")])
@pytest.mark.parametrize("layouts", [(True, True), pytest.param((False, False), marks=pytest.mark.long)])
def test_opcheck_of_the_kernel(triton_device, layouts, films):
    torch.use_deterministic_algorithms(False)  # poisoned outputs differ where opcheck compares two calls
    given = arguments((3, 16, 3), layouts=layouts, films=films, device=triton_device)
    torch.library.opcheck(torch.ops.fused_ddpm.bottleneck.default, (*given, 8, 1e-5))


def test_the_registered_operator_checks_rows_that_tracing_did_not():
    given = arguments((2, 8, 4))
    given[5] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"film_scale: got .* needs a floating \[2, 8\]"):
        torch.ops.fused_ddpm.bottleneck.default(*given, 8, 1e-5)


def test_two_graphs_serve_every_batch():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: bottleneck(*a), backend=count, fullgraph=True, dynamic=None)
    for n in (1, 2, 3, 5, 1, 8):
        given = arguments((n, 16, 4))
        if n > 1:
            torch._dynamo.mark_dynamic(given[0], 0)
            torch._dynamo.mark_dynamic(given[5], 0)
        torch.testing.assert_close(compiled(*given), bottleneck(*given))
    assert len(graphs) <= 2
    torch._dynamo.reset()


BAD = [
    ({"x": torch.zeros(2, 8, 4)}, "x: got torch.float32"),
    ({"x": torch.zeros(2, 8, 4, 8)[..., ::2]}, "x: has strides .* needs a channels_last or contiguous"),
    ({"up_weight": torch.zeros(8, 8, 4, 3)}, r"up_weight: got .* needs torch.float32 \[8, 8, 4, 4\]"),
    ({"up_weight": torch.zeros(8, 8, 4, 4).half()}, "up_weight: got torch.float16"),
    ({"up_weight": torch.zeros(8, 8, 4, 8)[..., ::2]}, "up_weight: has strides"),
    ({"up_bias": torch.zeros(7)}, r"up_bias: got torch.float32 \[7\], needs a floating tensor \[8\]"),
    ({"norm_weight": torch.zeros(8, 1)}, "norm_weight: got"),
    ({"norm_bias": torch.zeros(8, dtype=torch.int32)}, "norm_bias: got"),
    ({"film_scale": torch.zeros(3, 8)}, r"film_scale: got .* needs a floating \[2, 8\] or \[1, 8\]"),
    ({"film_scale": torch.zeros(2, 3, 8)}, r"film_scale: got .* \[1, 8\], or k >= 1 of them"),
    ({"film_scale": torch.zeros(0, 2, 8)}, "film_scale: got"),
    ({"film_scale": torch.zeros(1, 8, dtype=torch.int32)}, "film_scale: got torch.int32"),
    ({"film_shift": torch.zeros(8)}, "film_shift: got"),
    ({"film_shift": torch.zeros(1, 2, 8)}, "film_shift: got"),
    ({"film_shift": torch.zeros(1, 8, device="meta")}, "film_shift: is on meta"),
    ({"groups": 3}, "groups: got 3, needs a divisor of x's 8 channels"),
    ({"eps": -1.0}, "eps: got -1.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_line(change, message):
    names = ("x", "up_weight", "up_bias", "norm_weight", "norm_bias", "film_scale", "film_shift")
    given = dict(zip(names, arguments((2, 8, 4)), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=message) as error:
        bottleneck(**given)
    assert "\n" not in str(error.value)
