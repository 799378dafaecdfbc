"""guidance_rescale: the reference and the kernels against float64 mathematics, its two ends, bad input."""

import numpy as np
import pytest
import torch

from bench.kernels import TOLERANCE
from kernels import backend, guidance_rescale
from kernels.guidance_rescale import operator

SHAPES = [(3, 3, 16, 16), (2, 1, 5, 7), (4, 2), (2, 3, 48, 48), (1, 1, 64, 64), (0, 3, 4, 4)]
WEIGHTS = {"number": lambda n: 2.5, "one": lambda n: torch.tensor([2.5]), "each": lambda n: torch.linspace(-1, 7, n)}


@pytest.fixture(params=["triton", "native", "reference"])
def device(request, monkeypatch, poisoned):
    """Where the operator is one of its implementations."""
    if request.param == "triton":
        return request.getfixturevalue("triton_device")
    if request.param == "reference":
        monkeypatch.setattr("kernels.native.missing", lambda source: "a C++ compiler")
    return torch.device("cpu")


def outputs(shape, dtype=torch.float32, device="cpu"):
    """(m, m_uncond), each with a mean far from zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [(3 * k + torch.randn(shape, generator=generator)).to(device, dtype) for k in (1, 2)]


def mathematics(m, m_uncond, guidance, phi):
    """Lin et al. 2024, equations 15 and 16, sample by sample."""
    m, m_uncond = (tensor.double().cpu().numpy() for tensor in (m, m_uncond))
    weights = np.broadcast_to(np.asarray(guidance, np.float32).reshape(-1), len(m)) if len(m) else ()
    found = [np.empty((0, *m.shape[1:]))]
    for one, other, w in zip(m, m_uncond, weights, strict=True):
        guided = other + float(w) * (one - other)
        found.append((phi * guided * one.std() / guided.std() + (1 - phi) * guided)[None])
    return np.concatenate(found)


def close(found, expected, dtype):
    limit = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    np.testing.assert_array_less(np.abs(found.double().cpu().numpy() - expected), limit * np.abs(expected).clip(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_equations(device, shape, weights, dtype):
    m, m_uncond = outputs(shape, dtype, device)
    if dtype == torch.float64 and backend.runs_triton(m):
        pytest.skip("kernels compute in float32")
    w = WEIGHTS[weights](shape[0])
    expected = mathematics(m, m_uncond, w, 0.75)
    found = guidance_rescale(m, m_uncond, w if isinstance(w, float) else w.to(device), 0.75)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(found, expected, dtype)


def test_the_spread_is_that_of_the_conditional_output(device):
    m, m_uncond = outputs((2, 3, 8, 8), device=device)
    whole, none = (guidance_rescale(m, m_uncond, 4.0, phi) for phi in (1.0, torch.zeros((), device=device)))
    torch.testing.assert_close(whole.flatten(1).std(1), m.flatten(1).std(1), atol=1e-5, rtol=0)
    assert torch.equal(none, m_uncond + 4.0 * (m - m_uncond))


def test_a_flat_output_stays_as_it_is(device):
    """No spread to divide by; a sample beside it is rescaled."""
    m, m_uncond = outputs((2, 1, 4, 4), device=device)
    m[0], m_uncond[0] = 2.0, 1.0
    found = guidance_rescale(m, m_uncond, 3.0, 0.5)
    assert torch.equal(found[0], torch.full_like(m[0], 4.0))
    close(found[1:], mathematics(m[1:], m_uncond[1:], 3.0, 0.5), torch.float32)


def test_memory_formats(device):
    m, m_uncond = outputs((2, 3, 5, 4), device=device)
    expected = guidance_rescale(m, m_uncond, 3.0, 0.5)
    last = m.contiguous(memory_format=torch.channels_last)
    found = guidance_rescale(last, m_uncond, 3.0, 0.5)
    assert found.stride() == last.stride()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_registered_operator_has_no_gradient():
    m, m_uncond = outputs((2, 3))
    out = operator(m.requires_grad_(), m_uncond, torch.tensor(2.0), torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="no gradient is known of this operator"):
        out.sum().backward()


M = torch.ones(2, 3)
BAD = [
    ({"m": torch.ones(2)}, "m: got"),
    ({"m": torch.ones(2, 6)[:, ::2]}, "m: has strides"),
    ({"m_uncond": torch.ones(2, 4)}, r"m_uncond: got torch.float32 \[2, 4\], needs a floating tensor of m's shape"),
    ({"m_uncond": M.long()}, "m_uncond: got torch.int64"),
    ({"m_uncond": M.to("meta")}, "m_uncond: is on meta"),
    ({"guidance": torch.ones(3)}, r"guidance: got torch.float32 \[3\], needs a number or a floating \[2\]"),
    ({"guidance": torch.ones(2).long()}, "guidance: got torch.int64"),
    ({"guidance": float("nan")}, "guidance: got nan, needs a number in"),
    ({"guidance": 1e39}, r"guidance: got 1e\+39, needs a number in"),
    ({"rescale": 1.5}, r"rescale: got 1.5, needs a number in 0\.\.1"),
    ({"rescale": torch.ones(2)}, "rescale: got 2 elements"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        guidance_rescale(**{"m": M, "m_uncond": M, "guidance": 2.0, "rescale": 0.5} | change)
