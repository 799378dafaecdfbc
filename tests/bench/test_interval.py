"""The median's interval holds the true median as often as it says."""

import random
from statistics import median

import pytest

from bench.interval import measured_by, median_interval


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"), [(1, 0, 0, 0.0), (2, 0, 1, 0.5), (5, 0, 4, 0.9375), (8, 1, 6, 0.9296875)]
)
def test_order_statistics(n, low, high, coverage):
    values = random.Random(0).sample([float(k) for k in range(n)], n)  # noqa: S311
    found = median_interval(values)
    assert (found.low, found.high, found.coverage) == (low, high, coverage)
    assert found.median == median(values)


@pytest.mark.parametrize("n", [5, 6, 9, 12])
def test_the_coverage_is_kept_by_a_skewed_law(n):
    draw = random.Random(1)  # noqa: S311
    truth, trials = 0.6931471805599453, 4000  # the median of the exponential law: ln 2
    found = [median_interval([draw.expovariate(1.0) for _ in range(n)]) for _ in range(trials)]
    share = sum(interval.low <= truth <= interval.high for interval in found) / trials
    assert share == pytest.approx(found[0].coverage, abs=4 * (0.1 * 0.9 / trials) ** 0.5)


def test_text():
    assert median_interval([1.5, 1.0, 2.0, 3.0, 1.2]).text() == "1.50 (1.00 to 3.00)"
    assert median_interval([1.5]).text() == "1.50"
    assert measured_by(5) == "medians of 5 fresh processes, in brackets the 94% confidence interval of the median"
    assert measured_by(1) == "one process"


def test_nothing_has_no_median():
    with pytest.raises(ValueError, match="values: got none"):
        median_interval([])
