"""`pytest bench`: the quick workloads of the registry under pytest-benchmark, one test per competitor.

pytest-benchmark's own options apply. A candidate without parity fails and is not timed.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

from bench.measure import EAGER
from bench.registry import SUITES, Bench, Unavailable, Workload, load
from bench.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _built(workload: Workload) -> Bench:
    return workload.build(DEVICE)


def _cases() -> Iterator[Any]:
    """A skipped test for a suite that is not available. What cannot be built has one that fails with the reason."""
    for suite in SUITES:
        try:
            found = load(suite, quick=True)
        except Unavailable as reason:
            yield pytest.param(None, None, id=suite, marks=pytest.mark.skip(reason=str(reason)))
            continue
        for workload in found:
            names = [EAGER]
            with suppress(Exception):
                names += _built(workload).candidates
            yield from (pytest.param(workload, name, id=f"{workload.name} {name}") for name in names)


@pytest.mark.parametrize(("workload", "name"), _cases())
def test_benchmark(benchmark: Any, workload: Workload, name: str) -> None:
    """Time of one call, in this process, parity first."""
    bench = _built(workload)
    benchmark.group = workload.name
    call = bench.reference
    if name != EAGER:
        candidate = bench.candidates[name]
        call = candidate.make()
        error = candidate.error(call)
        assert 0 <= error <= candidate.tolerance, f"parity lost: {error} > {candidate.tolerance}"

    def every_set() -> None:
        for arguments in bench.sets:
            call(*arguments)
        synchronize(DEVICE)

    benchmark(every_set)
