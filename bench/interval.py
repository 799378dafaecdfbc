"""The median of a few processes and how far it can be trusted."""

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import NamedTuple

COVERAGE = 0.9


class Interval(NamedTuple):
    """A median and order statistics around it that hold the true median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float

    def text(self, digits: int = 2) -> str:
        """ "1.43 (1.40 to 1.46)", or of a single value "1.43"."""
        middle = f"{self.median:.{digits}f}"
        return f"{middle} ({self.low:.{digits}f} to {self.high:.{digits}f})" if self.coverage else middle


def measured_by(processes: int) -> str:
    """ "medians of 5 fresh processes, in brackets the 94% confidence interval of the median", or "one process"."""
    if processes == 1:
        return "one process"
    coverage = median_interval([0.0] * processes).coverage
    return f"medians of {processes} fresh processes, in brackets the {coverage:.0%} confidence interval of the median"


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest [k-th smallest, k-th largest] that covers the median with COVERAGE; with few values the widest.

    Distribution-free (Conover 1999, 3.2): values of independent processes fall below the true median like coins, so
    the k-th smallest lies above it with P(Binomial(n, 1/2) < k). Five values: their extremes, 93.75%.
    Raises ValueError without values.
    """
    if not values:
        raise ValueError("values: got none, needs at least one")
    ordered, n = sorted(values), len(values)
    covered = [1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n for k in range(1, (n + 1) // 2 + 1)]
    k = max((k for k, coverage in enumerate(covered) if coverage >= COVERAGE), default=0)
    return Interval(median(ordered), ordered[k], ordered[n - 1 - k], covered[k])
