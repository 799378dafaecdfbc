"""Independent truths that several test files compare with; nothing here calls the code under test."""

import gc
import math
import os

import numpy as np
import pytest
import torch

# Set before Triton is imported: without a GPU its kernels run in the interpreter. The tests of references and of
# everything above kernels/ turn it off again (see `references_on_the_cpu`).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Matrix products are deterministic on CUDA only with it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish():
    """What was imported stays to the end: each collection of garbage would look through its 650,000 objects, 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def references_on_the_cpu(monkeypatch):
    """CPU tensors take the PyTorch references, as they do for users; tests of Triton ask for `triton_device`."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)


@pytest.fixture(params=["native", "reference"])
def on_cpu(request, monkeypatch):
    """What operators are on CPU tensors: the kernel in C++, or the reference where there is no compiler."""
    if request.param == "reference":
        monkeypatch.setattr("kernels.native.missing", lambda source: "a C++ compiler")
    return request.param


@pytest.fixture
def poisoned():
    """Tensors are made full of NaN: what a kernel does not write stays so."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def triton_device(monkeypatch, poisoned):
    """Where Triton kernels run here, compiled on CUDA or interpreted on the CPU, with outputs poisoned with NaN."""
    backend = pytest.importorskip("kernels.backend")
    if backend.triton is None:
        pytest.skip("Triton is not installed")
    interpreted = not torch.cuda.is_available()
    monkeypatch.setattr("kernels.backend.INTERPRETED", interpreted)
    return torch.device("cpu" if interpreted else "cuda")


def _philox_block(seed, block, step, sample, stream):
    """Philox4x32-10 as its paper's algorithm, in Python integers: four words of one counter."""
    mask = 2**32 - 1
    key0, key1 = seed % 2**32, seed // 2**32
    x0, x1, x2, x3 = block, step, sample % 2**32, stream + 256 * (sample // 2**32)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return x0, x1, x2, x3


def _words(seed, sample, step, stream, numel):
    blocks = (_philox_block(seed, b, step, sample, stream) for b in range(math.ceil(numel / 4)))
    return [word for block in blocks for word in block][:numel]


def _normals(seed, samples, step, stream, shape):
    numel = math.prod(shape)
    if not len(samples):
        return np.empty((0, *shape))
    words = np.array([_words(seed, int(k), step, stream, 4 * math.ceil(numel / 4)) for k in samples], dtype=np.uint32)
    words = words.reshape(len(samples), -1, 2).astype(np.float32)
    u1 = (words[..., 0] * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    u2 = (words[..., 1] * np.float32(2**-32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u1))
    z = np.stack([radius * np.cos(2 * np.pi * u2), radius * np.sin(2 * np.pi * u2)], axis=-1)
    return z.reshape(len(samples), -1)[:, :numel].reshape(len(samples), *shape)


class _GaussianEps(torch.nn.Module):
    """The optimal noise prediction for data N(0, s^2 I): eps* = sqrt(1 - ab) x / (ab s^2 + 1 - ab)."""

    def __init__(self, schedule, s, sample_shape):
        super().__init__()
        self.alpha_bars, self.timesteps, self.s, self.sample_shape = (
            schedule.alpha_bars,
            schedule.timesteps,
            s,
            sample_shape,
        )

    def forward(self, x, t, c=None):
        ab = self.alpha_bars[torch.round(t.double() * self.timesteps).long()].to(x.dtype)
        ab = ab.reshape(-1, *(1,) * (x.ndim - 1))
        return (1 - ab).sqrt() * x / (ab * self.s**2 + 1 - ab)


@pytest.fixture(scope="session")
def plain_words():
    """plain_words(seed, sample, step, stream, numel) -> list of Python integers."""
    return _words


@pytest.fixture(scope="session")
def plain_normals():
    """plain_normals(seed, samples, step, stream, shape) -> float64 array [n, *shape]."""
    return _normals


@pytest.fixture(scope="session")
def gaussian_eps():
    """gaussian_eps(schedule, s, sample_shape) -> the closed-form noise predictor as a module."""
    return _GaussianEps


@pytest.fixture
def set_threads():
    """Sets how many threads PyTorch has; afterwards it has as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
