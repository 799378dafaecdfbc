"""group_norm_relu: the reference, the kernel against float64 mathematics, registration, bad input."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.kernels import TOLERANCE
from ddpm.engines import unavailable_reason
from ddpm.networks import ContextUnet
from kernels import backend, group_norm_relu, native
from kernels.group_norm_relu import SOURCE, in_cpp

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}

shapes = st.one_of(
    st.tuples(st.integers(1, 3), st.sampled_from([8, 16, 24, 40]), st.integers(1, 8), st.integers(1, 9)),
    # No images; one value per group; a group of several tiles, the last one full or not.
    st.sampled_from([(0, 8, 4, 4), (1, 8, 1, 1), (2, 64, 16, 16), (1, 16, 64, 96), (1, 24, 61, 67)]),
)
many = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arguments(shape, dtype=torch.float32, channels_last=True, device="cpu"):
    """(x, weight, bias), the mean of x far from zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2 + 5
    weight, bias = torch.randn(2, shape[1], generator=generator)
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[channels_last])
    return x.to(device), weight.to(device), bias.to(device)


def mathematics(x, weight, bias, groups=8, eps=1e-5):
    """The equation in float64, written out."""
    x, weight, bias = (tensor.double().cpu() for tensor in (x, weight, bias))
    grouped = x.unflatten(1, (groups, -1)).flatten(3)
    mean = grouped.mean((2, 3), keepdim=True)
    var = (grouped - mean).square().mean((2, 3), keepdim=True)
    normal = ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)
    return (normal * weight[:, None, None] + bias[:, None, None]).clamp(min=0)


def close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    if expected.numel():
        error = (actual.double().cpu() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() <= TOLERANCE[dtype], float(error.max())


@many
@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.float16]), channels_last=st.booleans())
def test_the_kernel(triton_device, shape, dtype, channels_last):
    x, weight, bias = arguments(shape, dtype, channels_last, triton_device)
    y = group_norm_relu(x, weight, bias)
    close(y, mathematics(x, weight, bias), dtype)
    assert y.stride() == x.stride()


@pytest.mark.parametrize(("groups", "eps"), [(1, 1e-5), (3, 0.1), (24, 1e-3)])
def test_groups_and_eps(triton_device, groups, eps):
    x, weight, bias = arguments((2, 24, 3, 5), device=triton_device)
    close(group_norm_relu(x, weight, bias, groups, eps), mathematics(x, weight, bias, groups, eps), torch.float32)


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 8, 64, 160)])
def test_moments_survive_a_mean_a_thousand_times_the_deviation(triton_device, shape):
    x, weight, bias = arguments(shape, device=triton_device)
    x = x + 2000
    expected = mathematics(x, weight, bias)
    assert (group_norm_relu(x, weight, bias).double().cpu() - expected).abs().max() < 2e-3


@pytest.mark.long
@pytest.mark.skipif(
    unavailable_reason("compile", torch.device("cpu")) is not None, reason="torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 8, 64, 160)])
def test_moments_survive_where_torch_compile_generates_them(shape):
    x, weight, bias = arguments(shape)
    x = (x + 2000).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(group_norm_relu, fullgraph=True)(x, weight, bias)
    assert (compiled.double() - mathematics(x, weight, bias)).abs().max() < 2e-3
    assert compiled.stride() == x.stride()


def test_bfloat16(triton_device):
    x, weight, bias = arguments((3, 64, 16, 16), torch.bfloat16, device=triton_device)
    close(group_norm_relu(x, weight, bias), mathematics(x, weight, bias), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="9 GiB of device memory")
def test_offsets_beyond_2_to_the_31(triton_device):
    n = 2**15 + 3
    x, weight, bias = arguments((4, 64, 32, 32), torch.bfloat16, device=triton_device)
    many_images = torch.zeros(n, 64, 32, 32, dtype=x.dtype, device=x.device).contiguous(memory_format=LAYOUTS[True])
    many_images[-4:] = x
    close(group_norm_relu(many_images, weight, bias)[-4:], mathematics(x, weight, bias), torch.bfloat16)


needs_cpp = pytest.mark.skipif(native.missing(SOURCE) is not None, reason=str(native.missing(SOURCE)))


@needs_cpp
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    "shape", [(1, 64, 16, 16), (3, 24, 5, 7), (5, 8, 1, 3), (2, 40, 9, 9), (2, 96, 17, 1), (1, 200, 8, 8)]
)
def test_in_cpp(poisoned, monkeypatch, shape, groups):
    """Channels last; the same bits on any number of threads and for every image alone."""
    x, weight, bias = arguments(shape)
    assert in_cpp(SOURCE, x, weight, bias)
    y = group_norm_relu(x, weight, bias, groups)
    close(y, mathematics(x, weight, bias, groups), torch.float32)
    assert y.stride() == x.stride()
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(torch.cat([group_norm_relu(one, weight, bias, groups) for one in x.split(1)]), y)
        assert torch.equal(group_norm_relu(x, weight, bias, groups), y)


@needs_cpp
def test_in_cpp_what_is_no_number_stays_none():
    x, weight, bias = arguments((2, 16, 4, 4))
    x[0, 3, 1, 1] = float("nan")
    y = group_norm_relu(x, weight, bias)
    assert y[0, 2:4].isnan().all()
    assert y[0, 4:].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_on_the_cpu(monkeypatch, dtype, channels_last):
    monkeypatch.setattr(sys.modules["kernels.group_norm_relu"], "in_cpp", lambda *_: False)
    x, weight, bias = arguments((2, 24, 5, 3), dtype, channels_last)
    y = group_norm_relu(x, weight, bias)
    close(y, mathematics(x, weight, bias), dtype)
    assert y.stride() == x.stride()


def test_it_is_what_the_out_head_computes(triton_device):
    head = ContextUnet(3, n_feat=16, n_cfeat=2).out
    x, norm_weight, norm_bias = arguments((2, 16, 16, 16))
    with torch.no_grad():
        head[1].weight.copy_(norm_weight)
        head[1].bias.copy_(norm_bias)
        expected = head[2](head[1](x))
        y = group_norm_relu(*(tensor.to(triton_device) for tensor in (x, head[1].weight, head[1].bias)))
    torch.testing.assert_close(y.cpu(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_opcheck(n, channels_last):
    torch.library.opcheck(
        torch.ops.fused_ddpm.group_norm_relu.default, (*arguments((n, 16, 4, 3), channels_last=channels_last), 8, 1e-5)
    )


def test_two_graphs_serve_every_batch():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: group_norm_relu(*a), backend=count, fullgraph=True, dynamic=None)
    for n in (1, 2, 3, 5, 1, 8):
        x, weight, bias = arguments((n, 16, 4, 4))
        if n > 1:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x, weight, bias), group_norm_relu(x, weight, bias))
    assert len(graphs) <= 2
    torch._dynamo.reset()


BAD = [
    ({"x": torch.zeros(2, 8, 4)}, "x: got torch.float32"),
    ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, "x: got torch.int64"),
    ({"x": torch.zeros(2, 8, 0, 4)}, "x: got .* elements per image"),
    ({"x": torch.zeros(2, 8, 4, 8)[..., ::2]}, "x: has strides .* needs a channels_last or contiguous"),
    ({"weight": torch.zeros(7)}, r"weight: got torch.float32 \[7\], needs a floating tensor \[8\]"),
    ({"bias": torch.zeros(8, dtype=torch.int32)}, "bias: got torch.int32"),
    ({"groups": 3}, "groups: got 3, needs a divisor of x's 8 channels"),
    ({"groups": 0}, "groups: got 0"),
    ({"eps": 0.0}, "eps: got 0.0"),
    ({"bias": torch.zeros(8, device="meta")}, "bias: is on meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_line(change, message):
    given = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.ones(8), "bias": torch.zeros(8)} | change
    with pytest.raises((TypeError, ValueError), match=message) as error:
        group_norm_relu(**given)
    assert "\n" not in str(error.value)
    if change.keys() & {"weight", "bias"}:
        assert error.type is ValueError


def test_a_symbolic_batch_of_torch_2_11_is_channels_last_by_its_strides(monkeypatch):
    def denies(tensor, memory_format=torch.contiguous_format):
        return memory_format == torch.contiguous_format and tensor.stride()[-1] == 1

    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.Tensor, "is_contiguous", denies)
    assert backend.is_channels_last(x)
    backend.check_layout("x", x)
    assert not backend.is_channels_last(x[:, :, :2])
