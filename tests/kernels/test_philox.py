"""The noise contract, bit for bit: known answers, a plain-integer Philox, and seeded statistics."""

from enum import IntEnum

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels import philox

KNOWN = [
    ((0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8", (0.991138, -0.924662, -0.617609, -0.482069)),
    ((7, 0, 500, 1), "be99e018 4b7a0d4d 6f8e0901 aea4934e", (-0.213512, 0.737836, -0.532633, -1.173722)),
    ((1234567890123, 5, 1, 1), "1b9c2390 7d2cedc7 ccb0774d e8d20b24", (-2.105382, 0.146187, 0.563503, -0.360323)),
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MANY = torch.arange(1000)
pytestmark = pytest.mark.usefixtures("on_cpu")


def ints(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "words", "_"), KNOWN)
def test_known_words_in_numpy(counter, words, _):
    got = philox.words(*counter, 4)
    assert got.dtype == np.uint32
    assert got.tolist() == ints(words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "words", "_"), KNOWN)
def test_known_words_in_torch(counter, words, _, device):
    seed, sample, step, stream = counter
    got = philox.word_tensor(seed, torch.tensor([sample], device=device), step, stream, 4)
    assert got.tolist() == [ints(words)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "_", "normals"), KNOWN)
def test_known_normals(counter, _, normals, device):
    seed, sample, step, stream = counter
    got = philox.normal(seed, torch.tensor([sample]), step, stream, (4,), device=device)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.cpu().numpy(), [normals], atol=1e-5, rtol=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    sample=st.integers(0, 2**56 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 255),
    numel=st.integers(0, 11),
)
@example(seed=2**63 - 1, sample=2**56 - 1, step=2**32 - 1, stream=255, numel=9)
@example(seed=2**32, sample=2**32, step=2**31, stream=0, numel=5)
@example(seed=2**32 - 1, sample=2**32 - 1, step=0, stream=7, numel=4)
def test_words_equal_a_plain_integer_philox(plain_words, seed, sample, step, stream, numel):
    expected = plain_words(seed, sample, step, stream, numel)
    assert philox.words(seed, sample, step, stream, numel).tolist() == expected
    assert philox.word_tensor(seed, torch.tensor([sample]), step, stream, numel).tolist() == [expected]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (1, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_follow_the_contracts_formula(plain_normals, shape, dtype):
    samples = [0, 3, 2**32 + 5, 2**56 - 1]
    got = philox.normal(2**63 - 1, torch.tensor(samples), 77, 1, shape, dtype=dtype)
    assert got.shape == (4, *shape)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), plain_normals(2**63 - 1, samples, 77, 1, shape), atol=1e-5, rtol=0)


def test_a_shorter_sample_is_the_beginning_of_a_longer_one():
    samples = torch.arange(3)
    long = philox.normal(1, samples, 2, 0, (13,))
    for numel in range(13):
        assert torch.equal(philox.normal(1, samples, 2, 0, (numel,)), long[:, :numel])


def test_a_sample_depends_on_its_index_and_not_on_its_row():
    samples = torch.tensor([9, 0, 4, 9])
    batch = philox.normal(5, samples, 1, 1, (2, 3))
    alone = torch.cat([philox.normal(5, samples[i : i + 1], 1, 1, (2, 3)) for i in range(4)])
    assert torch.equal(batch, alone)


def test_no_samples_is_an_empty_tensor():
    assert philox.normal(0, torch.empty(0, dtype=torch.int64), 0, 0, (3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(("r0", "u1"), [(0, 2.0**-33), (2**32 - 1, 1.0), (2**31, 0.5)])
@pytest.mark.parametrize("r1", [0, 2**31, 2**32 - 1])
def test_extreme_words_give_finite_normals(r0, u1, r1):
    z0, z1 = philox.box_muller(torch.tensor([r0, r1])).tolist()
    assert np.hypot(z0, z1) == pytest.approx(np.sqrt(-2 * np.log(u1)), abs=1e-6)


def test_every_counter_has_its_own_words():
    """Philox is a bijection of the counter, so its 128-bit blocks never repeat under one key."""
    samples = torch.tensor([*range(40), 2**32, 2**32 + 1, 2**40, 2**56 - 1])
    steps = [*range(12), 500, 500 | 1 << 20, 500 | 2 << 20, 2**32 - 1]
    words = [philox.word_tensor(3, samples, step, stream, 32) for step in steps for stream in philox.Stream]
    blocks = torch.stack(words).reshape(-1, 4)
    assert len(torch.unique(blocks, dim=0)) == len(blocks) == len(steps) * len(philox.Stream) * len(samples) * 8


def test_every_seed_has_its_own_words():
    words = [tuple(philox.words(seed, 0, 0, 0, 4)) for seed in [*range(1000), *(1 << bit for bit in range(10, 63))]]
    assert len(set(words)) == len(words)


def test_a_million_normals_pass_kolmogorov_smirnov():
    z = philox.normal(11, MANY, 0, 0, (1000,), dtype=torch.float64)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("power", [1, 2])
def test_neighbours_are_uncorrelated(power):
    """Neighbouring elements (z0 and z1 of a pair, and across pairs), samples and steps; limit 4 sigma."""
    z, later = (philox.normal(12, MANY, step, 1, (1000,), dtype=torch.float64) ** power for step in (1, 2))
    pairs = {
        "z0 and z1": (z[:, 0::2], z[:, 1::2]),
        "pairs": (z[:, 1:-1:2], z[:, 2::2]),
        "samples": (z[:-1], z[1:]),
        "steps": (z, later),
    }
    for name, (a, b) in pairs.items():
        correlation = np.corrcoef(a.flatten(), b.flatten())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.numel()), name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_seed_and_step_draw_the_same(shape):
    seed, step = 2**62 + 3, 2**32 - 1
    samples = torch.arange(4)
    got = philox.normal(torch.full(shape, seed), samples, torch.full(shape, step), 1, (5,))
    assert torch.equal(got, philox.normal(seed, samples, step, 1, (5,)))


def test_samples_of_any_integer_type():
    expected = philox.normal(0, torch.arange(4), 0, 0, (3,))
    for samples in (range(4), np.arange(4), torch.arange(4, dtype=torch.int32), torch.arange(4, dtype=torch.uint8)):
        assert torch.equal(philox.normal(0, torch.as_tensor(samples), 0, 0, (3,)), expected)


SEED, SAMPLES = 2**40 + 9, [0, 1, 2, 17, 2**33, 2**56 - 1]


@pytest.mark.parametrize("timesteps", [1, 7, 500, 4000])
def test_training_timesteps_formula(plain_words, timesteps):
    words = [plain_words(SEED, k, 0, 3, 1)[0] for k in SAMPLES]
    got = philox.training_timesteps(SEED, torch.tensor(SAMPLES), timesteps)
    assert got.tolist() == [1 + (r0 * timesteps >> 32) for r0 in words]


def test_training_timesteps_are_uniform_over_their_range():
    t = philox.training_timesteps(4, torch.arange(100_000), 50)
    counts = torch.bincount(t, minlength=51)
    assert len(counts) == 51
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.01


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_condition_dropout_formula(plain_words, probability):
    samples = [*SAMPLES, *range(100, 150)]
    expected = [plain_words(SEED, k, 0, 4, 1)[0] < int(probability * 2**32) for k in samples]
    got = philox.condition_dropped(SEED, torch.tensor(samples), probability)
    assert got.tolist() == expected
    assert got.any() == (probability > 0)
    assert got.all() == (probability == 1)


def test_condition_dropout_frequency():
    dropped = philox.condition_dropped(5, torch.arange(100_000), 0.1).sum().item()
    assert stats.binomtest(dropped, 100_000, 0.1).pvalue > 0.01


def test_flip_formula(plain_words):
    samples = [*SAMPLES, *range(100, 150)]
    got = philox.flipped(SEED, torch.tensor(samples))
    assert got.tolist() == [plain_words(SEED, k, 0, 6, 1)[0] >= 2**31 for k in samples]


@pytest.mark.parametrize("epoch", [0, 1, 6])
def test_epoch_order_formula(plain_words, epoch):
    items = 150
    words = [plain_words(SEED, epoch * items + j, 0, 5, 1)[0] for j in range(items)]
    assert philox.epoch_order(SEED, epoch, items).tolist() == sorted(range(items), key=words.__getitem__)


def test_epoch_order_is_stable_where_words_tie():
    items = 200_000
    words = philox.word_tensor(1, torch.arange(items), 0, 5, 1)[:, 0].numpy()
    assert len(np.unique(words)) < items
    np.testing.assert_array_equal(philox.epoch_order(1, 0, items).numpy(), np.argsort(words, kind="stable"))


ONE = torch.tensor([0])
BAD_SEEDS = [
    (-1, ValueError),
    (2**63, ValueError),
    (1.0, TypeError),
    ("1", TypeError),
    (True, TypeError),
    (None, TypeError),
    (torch.tensor([1, 2]), TypeError),
    (torch.tensor(1.0), TypeError),
    (torch.tensor(1, dtype=torch.int32), TypeError),
]


@pytest.mark.parametrize(("seed", "error"), BAD_SEEDS)
def test_bad_seeds(seed, error):
    with pytest.raises(error, match="seed: got"):
        philox.normal(seed, ONE, 0, 0, (2,))
    with pytest.raises(error, match="seed: got"):
        philox.words(seed, 0, 0, 0, 4)


BAD_SAMPLES = [
    (torch.tensor([-1]), ValueError),
    (torch.tensor([0, 2**56]), ValueError),
    (torch.tensor([0.0]), TypeError),
    (torch.tensor([True]), TypeError),
    (torch.tensor(0), TypeError),
    (torch.zeros(2, 2, dtype=torch.int64), TypeError),
]


@pytest.mark.parametrize(("samples", "error"), BAD_SAMPLES)
def test_bad_samples(samples, error):
    with pytest.raises(error, match="samples: got"):
        philox.normal(0, samples, 0, 0, (2,))


@pytest.mark.parametrize("sample", [-1, 2**56])
def test_bad_sample_of_words(sample):
    with pytest.raises(ValueError, match="sample: got"):
        philox.words(0, sample, 0, 0, 4)


@pytest.mark.parametrize("step", [-1, 2**32, 1.5])
def test_bad_steps(step):
    with pytest.raises((ValueError, TypeError), match="step: got"):
        philox.normal(0, ONE, step, 0, (2,))
    with pytest.raises((ValueError, TypeError), match="step: got"):
        philox.words(0, 0, step, 0, 4)


@pytest.mark.parametrize("stream", [-1, 256])
def test_bad_streams(stream):
    with pytest.raises(ValueError, match="stream: got"):
        philox.normal(0, ONE, 0, stream, (2,))
    with pytest.raises(ValueError, match="stream: got"):
        philox.words(0, 0, 0, stream, 4)


def test_a_stream_is_compared_as_a_number():
    """Dynamo of torch 2.11 compares no member of an enumeration."""

    class Mute(IntEnum):
        ONE = 1
        __lt__ = __le__ = __gt__ = __ge__ = None

    philox.check_integer("stream", Mute.ONE, 256)
