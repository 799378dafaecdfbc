"""Evaluation: the Frechet distance against other forms of it, and figures that mean what they say."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.svm import SVC

from ddpm.data import Dataset, load_data
from ddpm.errors import BadInput, WorkFailed
from ddpm.evaluation import evaluate, features, frechet_distance

RNG = np.random.default_rng(7)
CROSS = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


def test_frechet_distance_is_fids_formula():
    a = RNG.normal(size=(300, 6)) @ RNG.normal(size=(6, 6))
    b = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_one_dimension_is_the_closed_form():
    a, b = RNG.normal(1, 2, (50, 1)), RNG.normal(-1, 3, (70, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    a, b = CROSS * [1.0, 2.0], CROSS * [3.0, 0.5] + [1.0, -2.0]
    expected = (1 + 4) + 4 / 3 * ((3 - 1) ** 2 + (2 - 0.5) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_set_from_itself_is_zero_even_if_degenerate():
    a = RNG.normal(size=(20, 30))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 1) == pytest.approx(30, rel=1e-6)


def test_features_are_pixels_averaged_to_eight_by_eight():
    images = torch.from_numpy(RNG.uniform(-1, 1, (3, 2, 16, 16)))
    expected = images.numpy().reshape(3, 2, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(3, -1)
    np.testing.assert_allclose(features(images), expected, rtol=1e-12)


def test_features_of_other_shapes_are_averages_of_as_many_pixels():
    images = torch.from_numpy(RNG.uniform(-1, 1, (3, 2, 24, 16)))
    expected = images.numpy().reshape(3, 2, 8, 3, 8, 2).mean(axis=(3, 5)).reshape(3, -1)
    np.testing.assert_allclose(features(images), expected, rtol=1e-12)
    assert features(images[:, :, :, :4]).shape == (3, 2 * 8 * 4)


def test_colours_that_are_not_seen_count_for_nothing():
    images = torch.from_numpy(RNG.uniform(-1, 1, (3, 4, 8, 8)))
    images[:, 3, :4] = -1
    other = images.clone()
    other[:, :3, :4] = 0.7
    np.testing.assert_array_equal(features(images), features(other))
    black, white = (images[:, :3].numpy() * a + b * (1 - a) for a in [(images[:, 3:].numpy() + 1) / 2] for b in (-1, 1))
    np.testing.assert_allclose(features(images)[:, : 3 * 64], black.reshape(3, -1), rtol=1e-12)
    shown = features(images).reshape(3, 4, 64)
    np.testing.assert_allclose(shown[:, :3] + 1 - shown[:, 3:], white.reshape(3, 3, 64), rtol=1e-12)


def test_features_of_bytes_are_those_of_their_unit_range():
    values = torch.from_numpy(RNG.integers(0, 256, (3, 1, 8, 8), dtype=np.uint8))
    np.testing.assert_allclose(features(values), features(values / 127.5 - 1), rtol=1e-6, atol=1e-7)


def test_features_clamp_images_and_leave_points_alone():
    assert features(torch.full((1, 1, 8, 8), 5.0)).max() == 1
    assert features(torch.full((1, 2), 5.0)).tolist() == [[5.0, 5.0]]


def test_real_digits_as_samples_get_full_marks(digits):
    result = evaluate(digits.values, digits, digits.labels.argmax(1))
    assert result.frechet == pytest.approx(0, abs=1e-6)
    assert result.accuracy > 0.99
    assert (result.n, result.real) == (1797, 1797)


def test_wrong_classes_and_wrong_pictures_get_low_marks(digits):
    shifted = (digits.labels.argmax(1) + 1) % 10
    noise = torch.from_numpy(RNG.uniform(-1, 1, (200, 1, 16, 16))).float()
    assert evaluate(digits.values, digits, shifted).accuracy < 0.01
    result = evaluate(noise, digits, torch.arange(200) % 10)
    assert result.frechet > 10 * result.frechet_real
    assert result.accuracy < 0.3


def test_real_data_column_depends_on_the_data_alone(digits):
    one = evaluate(digits.values[:100], digits, digits.labels[:100].argmax(1))
    other = evaluate(digits.values[100:300] // 2, digits, torch.zeros(200, dtype=torch.int64))
    assert one.accuracy_real == other.accuracy_real
    assert one.frechet_real == other.frechet_real
    assert 0.95 < one.accuracy_real < 1
    assert 0 < one.frechet_real < 1


def test_perfect_samples_get_full_marks_whatever_was_asked_without_data(digits):
    """A class that no picture has is not counted, neither among one-hot labels nor among what was asked for."""
    kept = digits.labels.argmax(1) != 3
    data = Dataset("gap", digits.values[kept], digits.labels[kept], digits.classes)
    asked = data.labels.argmax(1)
    asked[::5] = 3
    result = evaluate(data.values, data, asked)
    assert result.accuracy > 0.99
    assert evaluate(data.values, data, torch.full_like(asked, 3)).accuracy is None


def test_other_conditions_have_no_accuracy(digits):
    data = Dataset("conditions", digits.values, digits.labels * 0.5, ())
    assert evaluate(digits.values[:50], data, torch.arange(50) % 10).accuracy is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused(digits, bad):
    samples = torch.zeros(4, 1, 16, 16)
    samples[1, 0, 3, 3] = bad
    with pytest.raises(WorkFailed, match="samples have NaN or infinite values"):
        evaluate(samples, digits, torch.arange(4))


def test_too_few_real_items_are_refused(digits):
    few = Dataset("few", digits.values[:3], None, ())
    with pytest.raises(BadInput, match="few: has 3 items, evaluation needs at least 4"):
        evaluate(digits.values[:9], few, None)


def test_one_class_is_always_right(digits):
    data = Dataset("one", digits.values[:40], torch.ones(40, 1), ("x",))
    result = evaluate(digits.values[:9], data, torch.zeros(9, dtype=torch.int64))
    assert (result.accuracy, result.accuracy_real) == (1.0, 1.0)


def test_the_classifier_learns_from_so_many_at_most(digits, monkeypatch):
    learned = []

    class Reader(SVC):
        def fit(self, values, labels):
            learned.append(len(values))
            return super().fit(values, labels)

    monkeypatch.setattr("sklearn.svm.SVC", Reader)
    monkeypatch.setattr("ddpm.evaluation.LEARNED_MAX", 500)
    result = evaluate(digits.values[:300], digits, digits.labels[:300].argmax(1))
    assert learned == [500, 500]
    assert result.accuracy > 0.9
    assert result.accuracy_real > 0.9


def test_features_do_not_depend_on_how_many_are_made_at_a_time(digits, monkeypatch):
    whole = features(digits.values[:50])
    monkeypatch.setattr("ddpm.evaluation.CHUNK", 7)
    assert np.array_equal(features(digits.values[:50]), whole)


def test_its_bar_is_shown_when_asked_for(digits, capsys):
    evaluate(digits.values[:9], digits, None)
    assert capsys.readouterr().err == ""
    evaluate(digits.values[:9], digits, None, quiet=False)
    assert "evaluate 100%" in capsys.readouterr().err


def test_data_without_classes_have_no_accuracy():
    data = Dataset("points", torch.from_numpy(RNG.normal(size=(40, 2))).float(), None, ())
    result = evaluate(data.values + 3, data, None)
    assert result.accuracy is None
    assert result.accuracy_real is None
    assert result.frechet == pytest.approx(18, rel=1e-4)
