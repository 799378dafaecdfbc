"""q_sample against x_t = sqrt(ab) x0 + sqrt(1 - ab) eps in float64, eps from an independent Philox."""

import numpy as np
import pytest
import torch

from kernels import q_sample

SHAPES = [(3, 1, 16, 16), (5, 3, 7, 9), (4, 17), (2, 1), (1, 2, 3, 5, 2)]
ALPHA_BARS = torch.linspace(1, 0.01, 11)
pytestmark = pytest.mark.usefixtures("on_cpu", "poisoned")


def arguments(shape, seed=3):
    """x0, t, samples of a seeded batch."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator)
    t = torch.randint(1, 11, shape[:1], generator=generator)
    return x0, t, 2**33 + 7 * torch.arange(shape[0])


def diffused(x0, t, noise):
    """The equation in float64 NumPy."""
    ab = ALPHA_BARS.numpy().astype(np.float64)[t.numpy()].reshape(-1, *(1,) * (x0.ndim - 1))
    return np.sqrt(ab) * x0 + np.sqrt(1 - ab) * noise


@pytest.mark.parametrize("shape", SHAPES)
def test_equation(plain_normals, shape):
    x0, t, samples = arguments(shape)
    x_t, noise = q_sample(x0, t, ALPHA_BARS, 99, samples)
    expected = plain_normals(99, samples, 0, 2, shape[1:])
    np.testing.assert_allclose(noise, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(x_t, diffused(x0.double().numpy(), t, expected), atol=1e-5, rtol=0)


def test_float64_is_computed_in_float64(plain_normals):
    x0, t, samples = arguments((4, 3, 5))
    x_t, noise = q_sample(x0.double(), t, ALPHA_BARS, 99, samples, torch.float64)
    expected = plain_normals(99, samples, 0, 2, (3, 5))
    np.testing.assert_allclose(noise, expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(x_t, diffused(x0.double().numpy(), t, expected), atol=1e-12, rtol=0)


def test_uint8_is_mapped_to_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    x_t, _ = q_sample(pixels, torch.tensor([1]), torch.ones(2), 0, torch.tensor([0]))
    expected = np.arange(256) / 127.5 - 1
    np.testing.assert_allclose(x_t[0], expected, atol=1e-7, rtol=0)
    assert (x_t[0, 0], x_t[0, -1]) == (-1, 1)


def test_uint8_and_its_floats_are_diffused_alike():
    _, t, samples = arguments((5, 3, 4, 4))
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(
        q_sample(pixels, t, ALPHA_BARS, 1, samples),
        q_sample(pixels.float() / 127.5 - 1, t, ALPHA_BARS, 1, samples),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("given", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_float32_unless_asked(given):
    x0, t, samples = arguments((3, 2, 4))
    outputs = q_sample(x0.abs().to(given), t, ALPHA_BARS, 0, samples)
    assert [output.dtype for output in outputs] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_are_the_rounded_float32_ones(dtype):
    x0, t, samples = arguments((3, 2, 4))
    exact = q_sample(x0, t, ALPHA_BARS, 0, samples)
    for got, expected in zip(q_sample(x0, t, ALPHA_BARS, 0, samples, dtype), exact, strict=True):
        assert torch.equal(got, expected.to(dtype))


def test_noise_does_not_depend_on_time_or_data():
    x0, t, samples = arguments((4, 6))
    _, noise = q_sample(x0, t, ALPHA_BARS, 5, samples)
    _, other = q_sample(-x0, 11 - t, ALPHA_BARS, 5, samples)
    assert torch.equal(noise, other)


def test_rows_do_not_depend_on_the_batch():
    x0, t, samples = arguments((4, 3, 5))
    x_t, _ = q_sample(x0, t, ALPHA_BARS, 5, samples)
    order = torch.tensor([2, 0, 3])
    part, _ = q_sample(x0[order], t[order], ALPHA_BARS, 5, samples[order])
    torch.testing.assert_close(part, x_t[order], atol=1e-6, rtol=0)


def test_memory_format_does_not_matter():
    x0, t, samples = arguments((3, 4, 5, 6))
    expected = q_sample(x0, t, ALPHA_BARS, 5, samples)
    got = q_sample(x0.contiguous(memory_format=torch.channels_last), t, ALPHA_BARS, 5, samples)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tensor_seed_draws_the_same():
    x0, t, samples = arguments((3, 4))
    got, expected = (q_sample(x0, t, ALPHA_BARS, seed, samples) for seed in (torch.tensor(8), 8))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_arguments_are_left_alone():
    x0, t, samples = arguments((3, 4))
    copies = [value.clone() for value in (x0, t, ALPHA_BARS, samples)]
    q_sample(x0, t, ALPHA_BARS, 0, samples)
    assert all(torch.equal(a, b) for a, b in zip((x0, t, ALPHA_BARS, samples), copies, strict=True))


def test_no_samples():
    x0, t, samples = arguments((0, 3, 4, 4))
    x_t, noise = q_sample(x0, t, ALPHA_BARS, 0, samples)
    assert x_t.shape == noise.shape == (0, 3, 4, 4)


def test_gradient_is_sqrt_alpha_bar():
    x0, t, samples = arguments((4, 3))
    x0.requires_grad_()
    x_t, noise = q_sample(x0, t, ALPHA_BARS, 0, samples)
    x_t.sum().backward()
    torch.testing.assert_close(x0.grad, ALPHA_BARS[t].sqrt()[:, None].expand(4, 3))
    assert not noise.requires_grad


def test_gradcheck():
    x0, t, samples = arguments((3, 2, 2))
    x0 = x0.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: q_sample(x, t, ALPHA_BARS, 0, samples, torch.float64)[0], x0)


X0, T, SAMPLES = torch.zeros(2, 3), torch.tensor([1, 10]), torch.arange(2)
BAD = [
    ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, "x0: got"),
    ({"x0": torch.tensor(0.0)}, "x0: got"),
    ({"t": torch.tensor([1.0, 2.0])}, "t: got"),
    ({"t": torch.tensor([1, 2], dtype=torch.int32)}, "t: got"),
    ({"t": torch.tensor([1])}, "t: got"),
    ({"t": torch.tensor([[1, 2]])}, "t: got"),
    ({"t": torch.tensor([0, 1])}, "t: got 0..1, needs 1..10"),
    ({"t": torch.tensor([1, 11])}, "t: got 1..11, needs 1..10"),
    ({"alpha_bars": ALPHA_BARS[None]}, "alpha_bars: got"),
    ({"alpha_bars": torch.ones(11, dtype=torch.int64)}, "alpha_bars: got"),
    ({"samples": torch.arange(3)}, "samples: got"),
    ({"samples": torch.arange(2.0)}, "samples: got"),
    ({"samples": torch.tensor([-1, 0])}, "samples: got"),
    ({"seed": -1}, "seed: got"),
    ({"seed": 2**63}, "seed: got"),
    ({"seed": 0.5}, "seed: got"),
    ({"dtype": torch.int64}, "dtype: got"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    good = {"x0": X0, "t": T, "alpha_bars": ALPHA_BARS, "seed": 0, "samples": SAMPLES}
    with pytest.raises((TypeError, ValueError), match=message):
        q_sample(**good | change)


def test_the_gradient_to_x0_by_gradcheck():
    x0 = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    t, samples = torch.tensor([3, 9]), torch.arange(2)
    alpha_bars = torch.linspace(1, 0.05, 11)
    assert torch.autograd.gradcheck(lambda x: q_sample(x, t, alpha_bars, 7, samples, torch.float64)[0], x0)
