"""The operators of training and sampling in C++: the noise contract, the references' bits, every layout and team."""

import hashlib
import json
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import guidance_rescale, native, noise_mse, philox, q_sample, q_sample_rows, solver_step

OPERATORS = ("philox", "q_sample", "noise_mse", "solver_step", "guidance_rescale")
lacks = [lack for name in OPERATORS if (lack := native.missing(native.source_of(name)))]
pytestmark = [pytest.mark.skipif(bool(lacks), reason="".join(lacks[:1])), pytest.mark.usefixtures("poisoned")]
SEED, TIMESTEPS = 2**62 + 12345, 50
ALPHA_BARS = torch.linspace(1, 1e-3, TIMESTEPS + 1)
# Samples of one unit of work and of several, of whole vectors and of rests, of few channels and of many.
SHAPES = [
    (1, 1),
    (700, 2),
    (3, 17),
    (2, 2048),
    (2, 2049),
    (1, 20_011),
    (3, 3, 7, 9),
    (5, 1, 28, 28),
    (2, 3, 48, 48),
    (2, 4, 37, 29),
    (1, 70, 9, 13),
    (1, 2100, 2, 1),
    (2, 2, 3, 5, 2),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
)
many = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def laid(values, layout):
    return values.contiguous(memory_format=layout) if values.ndim == 4 else values


def calls(shape, layout, pixels=False):
    """name -> the tensors that an operator makes of a batch."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, m, uncond, previous = (laid(torch.randn(shape, generator=generator), layout) for _ in range(4))
    n = shape[0]
    samples = 2**32 - 2 + 3 * torch.arange(n)
    data = laid(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), layout) if pixels else x
    table = torch.cat([torch.randn(3, 7, generator=generator), torch.tensor([[900.0], [31], [1]])], 1)
    table[1, 6] = 0
    t, rows = (torch.randint(1, high, (n,), generator=generator) for high in (TIMESTEPS + 1, n + 1))
    weight, guidance = torch.rand(n, generator=generator), torch.randn(3, n, generator=generator)

    def loss():
        pred = x.clone().requires_grad_()
        value = noise_mse(pred, SEED, samples, weight)
        return value.detach(), *torch.autograd.grad(value, pred)

    def step(index, uncond=None, guidance=1.0):
        state, before = x.clone(), previous.clone()
        solver_step(state, m, table, index, SEED, samples, uncond, guidance, before, 1.0 if index else None)
        return state, before

    return {
        "q_sample": lambda: q_sample(data, t, ALPHA_BARS, SEED, samples),
        "q_sample_rows": lambda: q_sample_rows(data, rows - 1, ALPHA_BARS, SEED, samples, flip=True, keep_noise=True),
        "noise_mse": loss,
        "solver_step": lambda: step(0),
        "solver_step, guided": lambda: step(2, uncond, guidance),
        "solver_step, no noise": lambda: step(1, uncond, 3.0),
        "guidance_rescale": lambda: (guidance_rescale(m, uncond, guidance[0], 0.7),),
    }


def results(*setting):
    return {name: call() for name, call in calls(*setting).items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_contract_s_and_words_are_bit_for_bit(shape):
    n, numel = shape[0], int(np.prod(shape[1:]))
    samples, steps = 2**32 - 2 + 3 * torch.arange(n), torch.arange(n) * 7 + 2**31
    counters = philox._counters(SEED, samples, steps, 5)
    words = philox._words(*counters, numel + numel % 2)
    assert torch.equal(philox.word_tensor(SEED, samples, steps, 5, numel), words[:, :numel])
    exact = philox.box_muller(words)[:, :numel]
    assert float((philox.normal(SEED, samples, steps, 5, (numel,)) - exact).abs().max()) < 2e-6


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("normal", [False, True])
def test_the_registered_operator(steps, normal):
    torch.library.opcheck(philox.operator, (torch.tensor([7]), torch.arange(3), torch.arange(steps), 1, 10, normal))


def test_a_million_normals_are_near_the_float64_formula():
    """The contract allows 1e-5; the largest distance found is 6e-7."""
    samples = torch.arange(64)
    exact = philox.normal(3, samples, 0, 0, (1 << 14,), dtype=torch.float64)
    assert float((philox.normal(3, samples, 0, 0, (1 << 14,)) - exact).abs().max()) < 1.5e-6


@many
@given(shape=shapes, layout=st.sampled_from(LAYOUTS), pixels=st.booleans(), threads=st.integers(1, 3))
def test_operators_are_their_references_with_the_kernel_s_normals(set_threads, shape, layout, pixels, threads):
    set_threads(threads)
    found = results(shape, layout, pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "missing", lambda source: None if source == philox.SOURCE else "a C++ compiler")
        expected = results(shape, layout, pixels)
    for name, tensors in expected.items():
        for got, wanted in zip(found[name], tensors, strict=True):
            assert got.stride() == wanted.stride()
            if name.startswith("solver_step"):
                assert torch.equal(got, wanted), name
            else:  # sums in another order; roots by a library that rounds otherwise
                torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_and_numbers_of_threads_do_not_change_bits(set_threads, shape):
    found = {}
    for layout in LAYOUTS if len(shape) == 4 else LAYOUTS[:1]:
        for threads in (1, 2):
            set_threads(threads)
            found[layout, threads] = results(shape, layout, True)
    for (layout, _), tensors in found.items():
        for name, expected in found[layout, 1].items():
            assert all(torch.equal(a, b) for a, b in zip(tensors[name], expected, strict=True)), name
        for name in ("q_sample", "q_sample_rows", "solver_step, guided"):
            expected = found[LAYOUTS[0], 1][name]
            assert all(torch.equal(a, b) for a, b in zip(tensors[name], expected, strict=True)), name


def test_the_loss_is_the_float64_one(plain_normals):
    pred = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    noise = plain_normals(SEED, range(4), 0, 2, (3, 40, 40))
    expected = np.square(pred.double().numpy() - noise).mean()
    for layout in LAYOUTS:
        loss = noise_mse(laid(pred, layout), SEED, torch.arange(4))
        assert loss.item() == pytest.approx(expected, rel=2e-7)


def test_what_is_no_number_stays_none():
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    x[0, 3], x[1, 5] = float("nan"), 1e30
    solver_step(x, torch.zeros(2, 8), torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 1]]), 0, 0, torch.arange(2), clip=1.0)
    assert x.isnan().nonzero().tolist() == [[0, 3]]
    assert x[1, 5] == 1


@pytest.mark.parametrize("name", OPERATORS)
def test_without_a_compiler_operators_are_their_references(monkeypatch, tmp_path, name):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FUSED_DDPM_CACHE", str(tmp_path))
    for cached in (native.load, native.function, native.missing):
        monkeypatch.setattr(native, cached.__name__, getattr(native, cached.__name__).__wrapped__)
    source = native.source_of(name)
    assert "found no no-such-compiler" in native.missing(source)
    monkeypatch.setattr("kernels.backend.launch_native", lambda *_: pytest.fail("there is no kernel"))
    module = import_module(f"kernels.{name}")
    assert source == module.SOURCE
    found = {
        "philox": lambda: philox.normal(0, torch.arange(2), 0, 0, (3,)),
        **{key.split(",")[0]: call for key, call in calls((2, 3, 4, 4), LAYOUTS[0]).items()},
    }[name]()
    assert all(tensor.isfinite().all() for tensor in found)


def digests():
    """Of what does not sum: the same in every instruction set."""
    found = {"normal": [philox.normal(SEED, torch.arange(3), 5, 1, (1001,))]}
    for shape in SHAPES[-8:]:
        for name, tensors in results(shape, torch.channels_last, True).items():
            found[f"{name} {shape}"] = tensors[1:] if name == "noise_mse" else tensors
    kept = {name: tensors for name, tensors in found.items() if "rescale" not in name}
    return {name: [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in kept[name]] for name in kept}


@pytest.mark.long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is what the others test here")
def test_avx2_has_the_same_bits():
    script = f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['digests']()))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests()
