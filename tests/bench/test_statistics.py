"""Mann-Whitney and Hodges-Lehmann against scipy and their definitions; what the gate's rules do to simulated noise."""

import random
from math import exp
from statistics import median

import pytest
from scipy.stats import mannwhitneyu

from bench.compare import AGAIN, PROCESSES
from bench.statistics import COVERAGE, hodges_lehmann, mann_whitney
from bench.verdicts import Thresholds, judge, pooled, suspects

SIZES = [(3, 9), (6, 6), (8, 8), (8, 16), (24, 24)]


def samples(draw, sizes, shift=0.0):
    return [draw.gauss(0, 1) for _ in range(sizes[0])], [draw.gauss(shift, 1) for _ in range(sizes[1])]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0])
def test_p_is_that_of_scipy(sizes, shift):
    draw = random.Random(1)  # noqa: S311
    for _ in range(10):
        base, head = samples(draw, sizes, shift)
        assert mann_whitney(base, head) == pytest.approx(mannwhitneyu(base, head, method="exact").pvalue, rel=1e-9)
        base, head = ([round(2 * value) for value in values] for values in (base, head))  # ties
        expected = mannwhitneyu(base, head, method="asymptotic").pvalue
        assert mann_whitney(base, head) == pytest.approx(expected, rel=1e-9)


def test_p_of_many_values_and_of_equal_ones():
    draw = random.Random(2)  # noqa: S311
    base, head = samples(draw, (150, 150), 0.2)
    assert mann_whitney(base, head) == pytest.approx(mannwhitneyu(base, head, method="asymptotic").pvalue, rel=1e-9)
    assert mann_whitney([1.0] * 6, [1.0] * 6) == 1
    assert mann_whitney([1.0] * 6, [2.0] * 6) < 0.005
    with pytest.raises(ValueError, match="got 0 and 1"):
        mann_whitney([], [1.0])


def test_the_ratio_is_the_median_of_all_pairs_and_one_bad_process_does_not_move_it():
    base, head = [1.0, 2.0, 4.0], [3.0, 5.0, 7.0]
    assert hodges_lehmann(base, head).median == median(b / a for a in base for b in head)
    found = hodges_lehmann([1.0] * 8, [1.1] * 7 + [50.0])
    assert (found.median, found.low, found.high) == (1.1, 1.1, 1.1)


@pytest.mark.parametrize("sizes", [(6, 6), (8, 8), (24, 24)])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says_and_agrees_with_the_test(sizes):
    draw = random.Random(3)  # noqa: S311
    times = held = 400
    for _ in range(times):
        base, head = ([exp(0.1 * value) for value in values] for values in samples(draw, sizes))
        ratio = hodges_lehmann(base, [1.3 * value for value in head])
        held -= not ratio.low <= 1.3 <= ratio.high
        # Inverted: 1 is outside exactly where the test says so.
        plain = hodges_lehmann(base, head)
        assert (plain.low <= 1 <= plain.high) == (mann_whitney(base, head) > 1 - COVERAGE)
    assert held / times >= COVERAGE - 3 * (COVERAGE * (1 - COVERAGE) / times) ** 0.5


def processes(draw, law, spread, count, turn):
    """The gating times of so many processes of a round: log-normal, and what else a machine does."""
    for number in range(count):
        value = draw.gauss(0, spread)
        if law == "drift":
            value += 2 * spread * (turn + number / count)
        if law == "tails" and draw.random() < 0.15:
            value += abs(draw.gauss(0, 5 * spread))
        if law == "bimodal" and draw.random() < 0.4:
            value += 2 * spread
        yield exp(value)


def measured(draw, law, spread, count, turn, factor):
    """(base, head) with one row."""

    def content(values):
        record = {"workload": "row", "candidate": "a", "parity": True, "kernel_us": 1.0, "against": "eager"}
        return {"processes": count, "records": [record | {"process": n, "gate": v} for n, v in enumerate(values)]}

    base, head = (processes(draw, law, spread, count, turn) for _ in range(2))
    return content(base), content([factor * value for value in head])


def found_slower(law, spread, factor, times):
    """The share of comparisons, of one round where that is certain, that end with `slower`."""
    draw, count, thresholds = random.Random(4), 0, Thresholds()  # noqa: S311
    for _ in range(times):
        first = measured(draw, law, spread, PROCESSES, 0, factor)
        found = judge(*first, thresholds)
        if suspects(found):
            second = measured(draw, law, spread, AGAIN * PROCESSES, 1, factor)
            found = pooled(first, second, thresholds)
        count += found[0].status == "slower"
    return count / times


LAWS = ("plain", "drift", "tails", "bimodal")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spread", [0.03, 0.05, 0.08])
def test_noise_alone_is_no_alarm(law, spread):
    """Of 10,000 rows 3 at 5% and 17 at 8% were alarms; 33 at the worst, where processes fall into two kinds."""
    assert found_slower(law, spread, 1.0, 400) <= 3 / 400


@pytest.mark.parametrize(("law", "spread", "power"), [
    ("plain", 0.03, 0.99), ("plain", 0.05, 0.96), ("drift", 0.05, 0.96), ("plain", 0.08, 0.75),
    ("tails", 0.03, 0.96), ("bimodal", 0.03, 0.96), ("tails", 0.05, 0.85), ("bimodal", 0.05, 0.85),
])  # fmt: skip
def test_ten_percent_are_found(law, spread, power):
    assert found_slower(law, spread, 1.1, 200) >= power


@pytest.mark.parametrize(("law", "spread"), [(law, 0.05) for law in LAWS] + [("plain", 0.08), ("drift", 0.08)])
def test_thirty_percent_are_always_found(law, spread):
    assert found_slower(law, spread, 1.3, 200) == 1
