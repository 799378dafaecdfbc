"""convolution in C++ against float64 mathematics: every sum, every end, ragged shapes; threads, instruction sets."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from kernels import convolution, native
from kernels.convolution import SOURCE
from kernels.packed import FEW, SUMS, WINOGRAD, kind_of, pack
from tests.kernels.test_convolution import arguments, mathematics

# Of normal inputs and weights of norm one, relative to max(1, |expected|), in units of float32's rounding: a sum of 800
# products; Winograd's transforms multiply what is rounded.
TOLERANCES = {SUMS: 128 * 2**-24, FEW: 64 * 2**-24, WINOGRAD: 320 * 2**-24}
LAST = torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.missing(SOURCE) is not None, reason=str(native.missing(SOURCE))),
]
many = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def distance(actual, expected):
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=LAST)
    return float(((actual.double() - expected).abs() / expected.abs().clamp(min=1)).max())


def kind_for(positional, keywords):
    weights = [weight for weight in (positional[1], keywords["skip_weight"]) if weight is not None]
    return kind_of(*weights, spread=keywords["then"] == "spread")


@many
@given(
    n=st.integers(1, 5),
    copies=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 5, 16, 32, 64, 96]),
    columns=st.sampled_from([1, 3, 4, 5, 32, 40, 64, 96]),
    sides=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    size=st.sampled_from([1, 3, 3]),
    skip=st.sampled_from([None, 3, 32, 64]),
    films=st.sampled_from([(None, None), ("rows", "one"), ("one", "rows"), (None, "one"), ("rows", None)]),
    onto=st.booleans(),
    gelu=st.booleans(),
    then=st.sampled_from(["keep", "pool", "spread"]),
    threads=st.integers(1, 3),
)
def test_it_is_the_mathematics(
    set_threads, n, copies, channels, columns, sides, size, skip, films, onto, gelu, then, threads
):
    if then == "pool":
        sides = tuple(2 * side for side in sides)
    if then == "spread":
        columns *= 4
    n *= copies
    positional, keywords = arguments(
        (n, channels, *sides),
        columns,
        size,
        skip=skip and (n // copies, skip),
        films=films,
        onto=onto,
        gelu=gelu,
        then=then,
    )
    set_threads(threads)
    actual = convolution(*positional, **keywords, kernel=True)
    assert distance(actual, mathematics(*positional, **keywords)) < TOLERANCES[kind_for(positional, keywords)]


KINDS = {
    "winograd": ((6, 32, 10, 12), 64, 3, (2, 32), "pool", WINOGRAD),
    "sums": ((6, 24, 6, 7), 40, 3, (3, 8), "keep", SUMS),
    "sums of pixels": ((6, 64, 4, 4), 256, 1, (6, 64), "spread", SUMS),
    "few": ((6, 40, 6, 8), 3, 3, (2, 16), "pool", FEW),
}


@pytest.mark.parametrize("name", KINDS)
def test_threads_and_batches_do_not_change_a_bit(set_threads, name):
    shape, columns, size, skip, then, kind = KINDS[name]
    positional, keywords = arguments(
        shape, columns, size, skip=skip, films=("rows", "one"), onto=True, gelu=True, then=then
    )
    assert kind_for(positional, keywords) == kind
    expected = convolution(*positional, **keywords, kernel=True)
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        assert torch.equal(convolution(*positional, **keywords, kernel=True), expected)
    x, *others = positional
    keywords["skip"] = keywords["skip"].repeat(len(x) // skip[0], 1, 1, 1)
    for i in range(len(x)):
        one = {key: keywords[key][i : i + 1] for key in ("skip", "film_scale", "onto")}
        actual = convolution(x[i : i + 1], *others, **keywords | one, kernel=True)
        assert torch.equal(actual, expected[i : i + 1])


@pytest.mark.parametrize("name", KINDS)
def test_packed_weights_are_the_same_weights(name):
    shape, columns, size, skip, then, kind = KINDS[name]
    (x, weight, bias), keywords = arguments(shape, columns, size, skip=skip, then=then)
    expected = convolution(x, weight, bias, **keywords, kernel=True)
    keywords["skip_weight"] = pack(keywords["skip_weight"], kind)
    assert torch.equal(convolution(x, pack(weight, kind), bias, **keywords), expected)
    nothing = keywords | {"skip": None, "skip_weight": None}
    assert convolution(x[:0], pack(weight, kind), bias, **nothing).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none(name, bad):
    shape, columns, size, _, then, _ = KINDS[name]
    positional, keywords = arguments(shape, columns, size, gelu=True, then=then)
    positional[0][1, 2, 2, 2] = bad
    y = convolution(*positional, **keywords, kernel=True)
    scale = {"keep": 1, "pool": 0.5, "spread": 2}[then]
    assert not y[1, :, int(2 * scale), int(2 * scale)].isfinite().any()
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()


def test_any_strides():
    positional, keywords = arguments((2, 32, 6, 5), 32, skip=(1, 32), films=("rows", "one"), onto=True)
    expected = convolution(*positional, **keywords, kernel=True)
    laid = {key: keywords[key].contiguous(memory_format=LAST) for key in ("skip", "onto")}
    laid["film_scale"] = keywords["film_scale"].t().contiguous().t()
    wide = torch.cat((positional[0],) * 2, 3)[:, :, :, :5]
    weight, bias = positional[1].contiguous(memory_format=LAST), positional[2].repeat_interleave(2)[::2]
    assert torch.equal(convolution(wide, weight, bias, **keywords | laid, kernel=True), expected)


def test_where_a_gradient_is_wanted_it_is_the_library():
    (x, weight, bias), _ = arguments((1, 32, 4, 4), 32)
    convolution(x, weight.requires_grad_(), bias, kernel=True).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_bad_packed_weights():
    (x, weight, bias), keywords = arguments((2, 32, 4, 4), 32, skip=(1, 32))
    packed = pack(weight, WINOGRAD)
    for skip_weight in (keywords["skip_weight"], pack(keywords["skip_weight"], SUMS)):
        with pytest.raises(ValueError, match="skip_weight: needs weights packed"):
            convolution(x, packed, bias, skip=keywords["skip"], skip_weight=skip_weight)
    with pytest.raises(TypeError, match=r"x: got torch.float64 on cpu, packed weights need float32 on the CPU"):
        convolution(x.double(), packed, bias.double())
    fake = FakeTensorMode().from_tensor(x)
    with pytest.raises(TypeError, match=r"x: got a FakeTensor, packed weights need"):
        convolution(fake, packed, bias)
    with pytest.raises(ValueError, match=r"x's weight: got torch.float32 \[32, 32, 3, 3\]"):
        convolution(torch.zeros(2, 64, 4, 4), packed, bias)


@pytest.mark.long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is what the others test here")
@pytest.mark.parametrize(
    ("file", "chosen"),
    [("convolution_native", "not avx2"), ("group_norm_relu", "in_cpp"), ("bottleneck", "in_cpp")],
)
def test_the_layers_for_avx2(file, chosen):
    path = str(Path(__file__).with_name(f"test_{file}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", chosen]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
