"""winograd: its matrices, the kernel and the reference against a direct sum in float64, registration, bad input."""

import os
import subprocess
import sys
from fractions import Fraction
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm.engines import unavailable_reason as missing_engine
from kernels import native, winograd
from kernels.winograd import A_T, B_T, PANEL, G, fits, launch, missing, operator, reference, transform

# Of normal inputs and weights of norm one, relative to max(1, |expected|); the root mean square error is a twentieth.
TOLERANCE = 2e-5
pytestmark = pytest.mark.usefixtures("poisoned")
needs_kernel = pytest.mark.skipif(missing() is not None, reason=str(missing()))
many = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arguments(n, channels, k, h, w, repeats=0, seed=0):
    """(x, plain weights, bias, plus or None)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    x = randn(n, channels, h, w).contiguous(memory_format=torch.channels_last)
    plus = randn(n // repeats, k, h, w) if repeats else None
    return x, randn(k, channels, 3, 3) / (9 * channels) ** 0.5, randn(k), plus


def mathematics(x, weight, bias=None, gelu=False, plus=None):
    """The direct sum in float64."""
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    y = y * (1 + torch.erf(y / 2**0.5)) / 2 if gelu else y
    return y if plus is None or not len(x) else y + torch.cat([plus.double()] * (len(x) // len(plus)))


def distance(actual, expected):
    assert actual.shape == expected.shape
    return float(((actual.double() - expected).abs() / expected.abs().clamp(min=1)).max()) if expected.numel() else 0.0


def exact(matrix):
    return [[Fraction(value).limit_denominator(1000) for value in row] for row in matrix]


def product(matrix, vector):
    return [sum((m * v for m, v in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def test_the_matrices_make_a_correlation_exactly():
    """In rational numbers, for every unit vector of pixels and of weights: it is bilinear."""
    a, b, g = exact(A_T), exact(B_T), exact(G)
    for i in range(6):
        for j in range(3):
            pixels, weights = ([Fraction(k == at) for k in range(size)] for size, at in ((6, i), (3, j)))
            points = [u * v for u, v in zip(product(g, weights), product(b, pixels), strict=True)]
            assert product(a, points) == [sum(weights[q] * pixels[p + q] for q in range(3)) for p in range(4)]


def test_a_machine_with_a_compiler_has_the_kernel():
    """Else the tests of the kernel would be skipped where it does not compile."""
    try:
        native.compiler(), native.instructions()
    except native.Unavailable as lack:
        pytest.skip(str(lack))
    assert missing() is None


@pytest.mark.long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is what the others test here")
@needs_kernel
def test_the_kernel_for_avx2():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "chain or tails"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_kernel
@many
@given(
    n=st.integers(1, 5),
    channels=st.sampled_from([32, 64, 96]),
    k=st.sampled_from([32, 64, 96]),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    biased=st.booleans(),
    gelu=st.booleans(),
    repeats=st.sampled_from([0, 1, 5]),
    threads=st.integers(1, 3),
)
def test_the_kernel(set_threads, n, channels, k, h, w, biased, gelu, repeats, threads):
    n = n * max(repeats, 1)
    x, weight, bias, plus = arguments(n, channels, k, h, w, repeats)
    bias = bias if biased else None
    set_threads(threads)
    y = winograd(x, [transform(weight)], [bias], gelu=gelu, plus=plus)
    assert distance(y, mathematics(x, weight, bias, gelu, plus)) < TOLERANCE
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (2, 16, 16), (7, 16, 16), (9, 5, 3), (11, 8, 8), (3, 9, 13), (40, 4, 4), (2, 40, 36)]
)
def test_a_chain_is_one_convolution_after_the_other(shape, threads, set_threads):
    """Few images layer by layer, small ones one by one, those of 40x36 with 96 channels too large for that."""
    n, h, w = shape
    set_threads(threads)
    widths = (32, 64, 32, 96)
    x, *_, plus = arguments(n, widths[0], widths[-1], h, w, repeats=1)
    plain = [arguments(1, c, k, 1, 1, seed=k) for c, k in pairwise(widths)]
    weights, biases = [transform(each[1]) for each in plain], [plain[0][2], None, plain[2][2]]
    expected, one_by_one = x, x
    for i, (_, weight, *_) in enumerate(plain):
        last = plus if i == 2 else None
        expected = mathematics(expected, weight, biases[i], True, last)
        one_by_one = winograd(one_by_one, [weights[i]], [biases[i]], gelu=True, plus=last)
    y = winograd(x, weights, biases, gelu=True, plus=plus)
    assert distance(y, expected) < TOLERANCE
    assert torch.equal(y, one_by_one)


@pytest.mark.parametrize("shape", [(2, 32, 64, 16, 16), (3, 64, 32, 7, 9), (1, 32, 32, 1, 1), (0, 32, 32, 4, 4)])
def test_the_reference(shape):
    x, weight, bias, plus = arguments(*shape, repeats=1)
    y = reference(x.double(), [transform(weight)], [bias.double()], plus.double(), True)
    # U is rounded to float32.
    assert distance(y, mathematics(x, weight, bias, True, plus)) < 3e-6


@needs_kernel
def test_it_rounds_little_more_than_the_direct_sum():
    x, weight, bias, _ = arguments(8, 64, 64, 16, 16)
    expected = mathematics(x, weight, bias)
    found, direct = winograd(x, [transform(weight)], [bias]), F.conv2d(x, weight, bias, padding=1)
    root_mean_square = [float((y - expected).square().mean().sqrt()) for y in (found, direct)]
    assert root_mean_square[0] < 2 * root_mean_square[1]


@needs_kernel
def test_rows_threads_and_batches_do_not_change_a_bit(set_threads):
    x, weight, bias, _ = arguments(21, 64, 64, 10, 12)
    chain = [transform(weight)] * 2, [bias, None]
    whole = winograd(x, *chain, gelu=True)
    for threads in (1, 2, 4):
        set_threads(threads)
        for count in (1, 2, 5):
            assert torch.equal(torch.cat([winograd(part, *chain, gelu=True) for part in x.split(count)]), whole)


@pytest.mark.parametrize(
    ("n", "side", "channels", "images"),
    [(2, 16, 64, True), (4, 8, 128, True), (1, 32, 32, False), (3, 8, 64, False), (2, 32, 96, False)],
)
def test_small_images_go_one_by_one_if_all_threads_are_busy(n, side, channels, images, monkeypatch, set_threads):
    """Else all of them layer by layer, for which the kernel is given memory."""
    calls = []
    monkeypatch.setattr(import_module("kernels.winograd"), "_kernel", lambda: lambda *given: calls.append(given))
    set_threads(2)
    weight = torch.zeros(channels // PANEL, 36, channels, PANEL)
    launch(torch.zeros(n, channels, side, side), [weight] * 2, [None] * 2, None, True)
    assert [given[5] is None for given in calls] == [images]


@needs_kernel
def test_gelu_and_its_tails():
    """One pixel, and the middle weight alone: the convolution is the identity, and no value rounds another."""
    weight = torch.zeros(32, 32, 3, 3)
    weight[range(32), range(32), 1, 1] = 1
    values = torch.cat((torch.linspace(-7, 7, 2**16 - 8), torch.tensor([-1e9, -100, -5.4, -1e-9, 0, 1e-9, 100, 1e9])))
    x = values.reshape(-1, 32, 1, 1)
    y = winograd(x, [transform(weight)], [None], gelu=True)
    expected = x.double() * (1 + torch.erf(x.double() / 2**0.5)) / 2
    assert distance(y, expected) < 1e-6


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad):
    x, weight, bias, _ = arguments(2, 32, 32, 8, 8)
    x[0, 3, 2, 2] = bad
    y = winograd(x, [transform(weight)], [bias], gelu=True)
    assert not y[0, :, 1:4, 1:4].isfinite().any()
    assert y[1].isfinite().all()
    assert y[0, :, 4:, 4:].isfinite().all()


@needs_kernel
def test_any_strides_of_x_and_plus():
    x, weight, bias, plus = arguments(2, 32, 64, 9, 5, repeats=2)
    u = transform(weight)
    expected = winograd(x, [u], [bias], plus=plus.contiguous(memory_format=torch.channels_last))
    assert torch.equal(winograd(x.contiguous(), [u], [bias], plus=plus), expected)
    wide = torch.cat((x, x), dim=3)[:, :, :, :5]
    assert torch.equal(winograd(wide, [u], [bias], plus=plus), expected)


def test_registration():
    x, weight, bias, plus = arguments(2, 32, 64, 8, 8, repeats=2)
    torch.library.opcheck(operator, (x, [transform(weight)], [bias], plus, True))
    torch.library.opcheck(operator, (x, [transform(weight)], [None], None, False))


@pytest.mark.long
@pytest.mark.skipif(missing_engine("compile", torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_torch_compile_takes_it_whole():
    x, weight, bias, plus = arguments(2, 32, 32, 8, 8, repeats=1)
    u = transform(weight)
    run = torch.compile(lambda x: winograd(x, [u], [bias], gelu=True, plus=plus) + 1, fullgraph=True)
    assert torch.equal(run(x), winograd(x, [u], [bias], gelu=True, plus=plus) + 1)


def test_without_the_kernel_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(import_module("kernels.winograd"), "missing", lambda: "a compiler")
    x, weight, bias, plus = arguments(2, 32, 32, 6, 6, repeats=2)
    y = winograd(x, [transform(weight)], [bias], gelu=True, plus=plus)
    assert torch.equal(y, reference(x, [transform(weight)], [bias], plus, True))


@needs_kernel
@pytest.mark.parametrize("count", [1, 2])
def test_no_memory_for_the_threads_is_a_memory_error(monkeypatch, count):
    """2^40 channels ask for petabytes before anything is read, layer by layer and (two of them) by images."""
    module, seen = import_module("kernels.winograd"), []

    def wider(*arguments):
        *before, widths, layers, repeats, gelu, threads = arguments
        seen.append(kernel(*before, type(widths)(*[1 << 40] * (count + 1)), layers, repeats, gelu, threads))
        return seen[-1]

    kernel = module._kernel()
    monkeypatch.setattr(module, "_kernel", lambda: wider)
    x, weight, bias, _ = arguments(4, 32, 32, 8, 8)
    with pytest.raises(MemoryError, match=r"winograd: no memory for the \d+ threads of .*\[4, 32, 8, 8\]"):
        winograd(x, [transform(weight)] * count, [bias] * count)
    assert seen == [1]


# In a new thread of Python OpenMP starts threads of its own: without room for them its runtime ends the process.
STARVED = """
import resource, threading, torch
from kernels.winograd import winograd, missing, transform
assert missing() is None
torch.set_num_threads(2)
x, w = torch.ones(16, 512, 8, 8).contiguous(memory_format=torch.channels_last), transform(torch.ones(512, 512, 3, 3))
ratios = []

def work():
    for room in [*range(0, 8000, 500), 1 << 20]:
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + (room << 10), -1))
        try:
            ratios.append(float(winograd(x, [w, w], [None, None])[0, 0, 4, 4]) / 4608**2)
        except (MemoryError, RuntimeError):  # the latter is PyTorch's own
            continue

thread = threading.Thread(target=work) if IN_THREAD else None
thread.start() if thread else work()
thread and thread.join()
assert ratios and all(abs(ratio - 1) < 1e-5 for ratio in ratios), ratios
print("alive")
"""


@needs_kernel
@pytest.mark.long
@pytest.mark.parametrize("in_thread", [False, True])
def test_no_room_leaves_the_process_alive(in_thread):
    code = STARVED.replace("IN_THREAD", str(in_thread))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_which_weights_fit():
    assert fits(torch.empty(64, 32, 3, 3))
    for shape in ((64, 32, 1, 1), (64, 3, 3, 3), (3, 64, 3, 3), (48, 64, 3, 3)):
        assert not fits(torch.empty(shape))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 32, 8)}, ValueError, r"x: got \[2, 32, 8\], needs \[n, C, h, w\]"),
        ({"x": torch.zeros(2, 32, 0, 8)}, ValueError, "needs .* at least one pixel"),
        ({"x": torch.zeros(2, 32, 8, 8).double()}, TypeError, "x: got torch.float64, needs float32"),
        (
            {"x": torch.zeros(2, 64, 8, 8)},
            ValueError,
            r"weights\[0\]: got \[2, 36, 32, 32\], needs \[K / 32, 36, 64, 32\]",
        ),
        ({"weight": torch.zeros(64, 32, 3, 3)}, ValueError, r"weights\[0\]: got .*kernels.winograd.transform"),
        ({"weight": torch.zeros(0, 36, 32, 32)}, ValueError, r"weights\[0\]: got \[0, 36, 32, 32\]"),
        ({"weight": torch.zeros(2, 36, 32, 64)[..., ::2]}, ValueError, r"weights\[0\]: has strides"),
        ({"bias": torch.zeros(32)}, ValueError, r"biases\[0\]: got \[32\]"),
        ({"bias": torch.zeros(128)[::2]}, ValueError, r"biases\[0\]: .* needs contiguous \[64\]"),
        ({"bias": torch.zeros(64).half()}, TypeError, r"biases\[0\]: got torch.float16"),
        ({"plus": torch.zeros(3, 64, 8, 8)}, ValueError, r"plus: got \[3, 64, 8, 8\], needs \[2 or a divisor"),
        ({"plus": torch.zeros(2, 32, 8, 8)}, ValueError, "plus: got"),
        ({"plus": torch.zeros(0, 64, 8, 8)}, ValueError, "plus: got"),
        ({"x": torch.zeros(2, 32, 8, 8, requires_grad=True)}, ValueError, "x: requires a gradient"),
    ],
)
def test_bad_input(change, error, message):
    given = {"x": torch.zeros(2, 32, 8, 8), "weight": torch.zeros(64 // PANEL, 36, 32, PANEL)} | change
    with pytest.raises(error, match=message):
        winograd(given["x"], [given["weight"]], [given.get("bias")], plus=given.get("plus"))


def test_lists_of_different_lengths_and_tensors_alone():
    x, weight = torch.zeros(2, 32, 8, 8), torch.zeros(1, 36, 32, 32)
    for weights, biases in (([], []), ([weight], []), ([weight], [None, None])):
        with pytest.raises(ValueError, match=r"weights: got \d with \d biases"):
            winograd(x, weights, biases)
    with pytest.raises(TypeError, match="got a Tensor, needs a list"):
        winograd(x, weight, None)


@pytest.mark.parametrize("shape", [(64, 32, 1, 1), (33, 32, 3, 3), (32, 3, 3, 3), (32, 32, 3)])
def test_weights_that_cannot_be_transformed(shape):
    with pytest.raises(ValueError, match=r"weight: got .* needs .*multiples of 32"):
        transform(torch.zeros(shape))
