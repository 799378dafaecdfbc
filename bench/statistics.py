"""Whether two samples of processes differ, and by what ratio: Mann-Whitney, Hodges-Lehmann and its interval.

Hodges & Lehmann 1963; the interval inverts the test (Hollander, Wolfe & Chicken 2014, 4.3). Neither asks for a law of
the noise, and one process that was disturbed moves neither by much.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import erfc, sqrt
from statistics import NormalDist, median
from typing import NamedTuple

COVERAGE = 0.95
# Products of sample sizes up to which the distribution of U is counted out: 100 a side are a tenth of a second, once.
EXACT = 10_000


class Ratio(NamedTuple):
    """Head over base: the median of all pairwise ratios, and what holds the true one with probability COVERAGE."""

    median: float
    low: float
    high: float


@cache
def _orders(n: int, m: int) -> list[int]:
    """How many of the orders of n and m different values have U <= 0, 1, .., n m: the Gaussian binomial, summed up.

    The product over i = 1..n of (1 - q^(m+i)) / (1 - q^i); the coefficient of q^u counts the orders with U = u.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return list(accumulate(counts))


def mann_whitney(base: Sequence[float], head: Sequence[float]) -> float:
    """The two-sided p of Mann-Whitney's test: exact without ties, else normal, corrected for ties and continuity."""
    n, m = len(base), len(head)
    if not n or not m:
        raise ValueError(f"samples: got {n} and {m} values, needs at least one of each")
    ordered = sorted(base)
    u = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in head) / 2
    smaller = min(u, n * m - u)
    ties = [count for count in Counter((*base, *head)).values() if count > 1]
    if not ties and n * m <= EXACT:
        orders = _orders(*sorted((n, m)))
        return min(1.0, 2 * orders[int(smaller)] / orders[-1])
    total = n + m
    correction = sum(count**3 - count for count in ties) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - correction)
    if variance <= 0:  # all values are one
        return 1.0
    return min(1.0, erfc((n * m / 2 - smaller - 0.5) / sqrt(2 * variance)))


@cache
def _rank(n: int, m: int) -> int:
    """k: with probability COVERAGE the true ratio lies between the k-th smallest and the k-th largest pairwise one."""
    beyond = (1 - COVERAGE) / 2
    if n * m <= EXACT:
        orders = _orders(*sorted((n, m)))
        return max(1, bisect_right(orders, int(beyond * orders[-1])))
    return int(n * m / 2 + NormalDist().inv_cdf(beyond) * sqrt(n * m * (n + m + 1) / 12))


def hodges_lehmann(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Head over base of positive values. With fewer than four a side the interval is the widest there is."""
    ratios = sorted(after / before for before in base for after in head)
    k = _rank(len(base), len(head))
    return Ratio(median(ratios), ratios[k - 1], ratios[-k])
