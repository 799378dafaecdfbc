"""torch.compile with inductor, and when Triton compiles a kernel again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.static import sass
from kernels import backend, noise_mse, philox, q_sample, q_sample_rows, solver_step
from kernels.convolution import launch as launch_convolution
from kernels.noise_mse import launch as launch_noise_mse
from kernels.q_sample import launch as launch_q_sample
from kernels.q_sample_rows import launch as launch_q_sample_rows
from kernels.solver_step import launch as launch_solver_step

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
compiling = pytest.mark.skipif(INTERPRETED, reason="run by test_kernel_keys_in_a_process_that_compiles")
SHAPES = [(3, 16, 16), (1, 28, 28), (1, 5, 7), (3,)]


def one(value=0, dtype=torch.int64):
    return torch.tensor(value, dtype=dtype)


def launches(n, shape, dtype, channels_last):
    """name -> a call of every operator's launch on n rows."""
    x = torch.zeros(n, *shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    rows, weight = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    return {
        "q_sample": lambda: launch_q_sample(x, rows, torch.ones(501), one(), rows, dtype),
        "q_sample_rows": lambda: launch_q_sample_rows(
            torch.zeros(100, *shape, dtype=torch.uint8), rows, torch.ones(501), one(), rows, True, True, dtype
        ),
        "noise_mse": lambda: launch_noise_mse(x, one(), rows, weight, None),
        "noise_mse_backward": lambda: launch_noise_mse(x, one(), rows, weight, one(1, torch.float32)),
        "solver_step": lambda: launch_solver_step(
            x, x, torch.zeros(9, 8), one(), one(), rows, x, one(1, torch.float32), x, 1.0
        ),
    }


def key(name, *setting):
    return key_of(launches(*setting)[name])


def key_of(call):
    """What Triton compiles a kernel for: the launch, its constants and how its arguments are specialised."""
    with backend.recording() as recorded:
        call()
    (launch,) = recorded
    _, signature, constants, attributes = sass.specialized(launch, 90)
    return launch.kernel.fn.__name__, launch.constants, signature, constants, attributes


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="this process compiles")
def test_kernel_keys_in_a_process_that_compiles():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "another", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert result.returncode == 0, result.stdout
    assert "12 passed" in result.stdout
    assert "skipped" not in result.stdout


@compiling
@pytest.mark.parametrize("name", list(launches(1, (3,), torch.float32, False)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_another_batch_is_no_other_kernel(name, channels_last):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            first, *others = (key(name, n, shape, dtype, channels_last) for n in (2, 1, 3, 16, 48))
            assert all(other == first for other in others), shape


@compiling
def test_another_batch_is_no_other_convolution_where_it_has_the_same_tiles():
    def call(n):
        x = torch.zeros(n, 64, 16, 16, dtype=torch.bfloat16)
        weight = torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16)
        return lambda: launch_convolution(x, weight, None, x, weight, None, None, None, True, "keep")

    first, *others = (key_of(call(n)) for n in (64, 65, 96))
    assert all(other == first for other in others)
    assert key_of(call(1)) != first


@compiling
def test_pointers_stay_specialised_and_another_image_is_another_kernel():
    """16-byte accesses need to know that pointers are aligned; and keys can differ."""
    whole, cut = (key("q_sample", 2, shape, torch.float32, False) for shape in SHAPES[::2])
    assert whole != cut
    *_, attributes = whole
    assert {("tt.divisibility", 16)} <= {tuple(pair) for pairs in attributes.values() for pair in pairs}
    assert len(attributes) >= 7  # x0, t, alpha_bars, seed, samples, x_t, noise


def step(x, m, table, index, seed, samples):
    """A step as samplers write it, with arithmetic around the operator for inductor to compile."""
    return solver_step(x.clone(), 0.5 * m + x, table, index, seed, samples) * 2


def train(x0, t, alpha_bars, seed, samples):
    x_t, _ = q_sample(x0, t, alpha_bars, seed, samples)
    return noise_mse(x_t.tanh(), seed, samples)


def gather(data, rows, alpha_bars, seed, samples):
    x_t, t, _ = q_sample_rows(data, rows, alpha_bars, seed, samples)
    return x_t * t[:, None]


def arguments(function, n):
    samples, seed, alpha_bars = torch.arange(n) + 5, one(2**40 + n), torch.linspace(1, 1e-3, 11)
    x = philox.normal(1, samples, 0, 0, (12,))
    return {
        step: (x, x.flip(0), torch.rand(11, 8, generator=torch.Generator().manual_seed(n)), one(3), seed, samples),
        train: (x, samples % 10 + 1, alpha_bars, seed, samples),
        gather: (torch.arange(84, dtype=torch.uint8).reshape(7, 12), samples % 7, alpha_bars, seed, samples),
    }[function]


@pytest.mark.long  # 20 to 80 s, most of it the C++ compiler
@pytest.mark.parametrize("function", [step, train, gather])
def test_inductor_serves_every_batch_with_two_graphs(function):
    """The default backend, which needs a C++ compiler on the CPU; operators are calls that it leaves as they are."""
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"inductor finds no C++ compiler: {error}")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(function, fullgraph=True)
    for n in (1, 2, 5, 3):
        given = arguments(function, n)
        for tensor in given:
            if n > 1 and tensor.ndim and tensor.shape[0] == n:
                torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(*given), function(*given))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()
