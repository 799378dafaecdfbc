"""noise_mse against the weighted mean squared error in float64, its noise from an independent Philox."""

import numpy as np
import pytest
import torch

from kernels import noise_mse, q_sample

SHAPES = [(3, 1, 16, 16), (5, 3, 7, 9), (4, 17), (2, 1), (1, 2, 3, 5, 2)]
pytestmark = pytest.mark.usefixtures("on_cpu", "poisoned")


def arguments(shape, dtype=torch.float32):
    """pred, samples and weight of a seeded batch."""
    generator = torch.Generator().manual_seed(4)
    pred = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(shape[:1], generator=generator) + 0.1
    return pred, 2**34 + 3 * torch.arange(shape[0]), weight


def error(pred, samples, plain_normals):
    """pred - eps in float64, [n, numel]."""
    noise = plain_normals(21, samples, 0, 2, pred.shape[1:])
    return (pred.detach().double().numpy() - noise).reshape(len(samples), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_equation(plain_normals, shape, weighted):
    pred, samples, weight = arguments(shape)
    loss = noise_mse(pred, 21, samples, weight if weighted else None)
    per_sample = (error(pred, samples, plain_normals) ** 2).mean(axis=1)
    expected = (per_sample * weight.numpy()).mean() if weighted else per_sample.mean()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_predictions_are_compared_in_float32(plain_normals, dtype):
    pred, samples, _ = arguments((4, 33), dtype)
    loss = noise_mse(pred, 21, samples)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((error(pred, samples, plain_normals) ** 2).mean(), rel=2e-6)


def test_float64_is_computed_in_float64(plain_normals):
    pred, samples, _ = arguments((4, 33), torch.float64)
    loss = noise_mse(pred, 21, samples)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx((error(pred, samples, plain_normals) ** 2).mean(), rel=1e-12)


def test_a_float64_weight_leaves_the_loss_float32():
    pred, samples, weight = arguments((4, 5))
    loss = noise_mse(pred, 21, samples, weight.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(noise_mse(pred, 21, samples, weight).item(), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_q_samples_noise_has_no_loss(shape):
    samples = torch.arange(shape[0]) + 50
    t, alpha_bars = torch.ones(shape[0], dtype=torch.int64), torch.tensor([1.0, 0.5])
    _, noise = q_sample(torch.zeros(shape), t, alpha_bars, 8, samples)
    assert noise_mse(noise, 8, samples) == 0
    assert noise_mse(noise, 9, samples) > 0
    assert noise_mse(noise, 8, samples + 1) > 0


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_equation(plain_normals, weighted):
    pred, samples, weight = arguments((3, 2, 5))
    pred.requires_grad_()
    noise_mse(pred, 21, samples, weight if weighted else None).backward()
    scale = weight.numpy()[:, None] if weighted else 1.0
    expected = 2 * scale * error(pred, samples, plain_normals) / pred.numel()
    np.testing.assert_allclose(pred.grad.reshape(3, -1), expected, atol=1e-6, rtol=0)


def test_gradcheck():
    pred, samples, weight = arguments((3, 2, 2), torch.float64)
    weight = weight.double()
    assert torch.autograd.gradcheck(lambda p: noise_mse(p, 21, samples, weight), pred.requires_grad_())


def test_tensor_seed_draws_the_same():
    pred, samples, _ = arguments((3, 5))
    assert torch.equal(noise_mse(pred, torch.tensor(21), samples), noise_mse(pred, 21, samples))


def test_memory_format_does_not_matter():
    pred, samples, _ = arguments((2, 3, 4, 5))
    loss = noise_mse(pred.contiguous(memory_format=torch.channels_last), 21, samples)
    torch.testing.assert_close(loss, noise_mse(pred, 21, samples), atol=0, rtol=1e-6)


BAD = [
    ({"pred": torch.zeros(0, 3)}, "pred: got"),
    ({"pred": torch.zeros(2, 3, dtype=torch.int64)}, "pred: got"),
    ({"pred": torch.zeros(2)}, "pred: got"),
    ({"samples": torch.arange(3)}, "samples: got"),
    ({"samples": torch.zeros(2, 1, dtype=torch.int64)}, "samples: got"),
    ({"samples": torch.arange(2.0)}, "samples: got"),
    ({"samples": torch.tensor([0, 2**56])}, "samples: got"),
    ({"weight": torch.ones(3)}, "weight: got"),
    ({"weight": torch.ones(2, 1)}, "weight: got"),
    ({"seed": -1}, "seed: got"),
    ({"seed": 2**63}, "seed: got"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    good = {"pred": torch.zeros(2, 3), "seed": 0, "samples": torch.arange(2)}
    with pytest.raises((TypeError, ValueError), match=message):
        noise_mse(**good | change)
