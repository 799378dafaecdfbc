"""`pytest bench`: the quick workloads of the registry under pytest-benchmark, one test per competitor.

pytest-benchmark's own options apply (--benchmark-json, --benchmark-histogram, --benchmark-compare-fail). A candidate
without parity fails and is not timed.
"""

from functools import cache
from typing import Any

import pytest
import torch

from bench.measure import EAGER
from bench.registry import SUITES, Bench, Unavailable, Workload, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _built(workload: Workload) -> Bench:
    return workload.build(DEVICE)


def _competitors(workload: Workload) -> list[str]:
    """Names of what competes. A workload that cannot be built still gets a test, which fails with the reason."""
    try:
        return [EAGER, *_built(workload).candidates]
    except Exception:
        return [EAGER]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per competitor of every workload; a skipped one per suite that is not available."""
    cases: list[Any] = []
    for suite in SUITES:
        try:
            found = load(suite, quick=True)
        except Unavailable as reason:
            cases.append(pytest.param(None, None, id=suite, marks=pytest.mark.skip(reason=str(reason))))
            continue
        cases += [pytest.param(w, name, id=f"{w.name} {name}") for w in found for name in _competitors(w)]
    metafunc.parametrize(("workload", "name"), cases)


def test_benchmark(benchmark: Any, workload: Workload, name: str) -> None:
    """Time of one call, in this process, parity first."""
    bench = _built(workload)
    benchmark.group = workload.name
    call = bench.reference
    if name != EAGER:
        candidate = bench.candidates[name]
        call = candidate.make()
        error = candidate.error(call)
        assert error <= candidate.tolerance, f"parity lost: {error} > {candidate.tolerance}"

    def every_set() -> None:
        for arguments in bench.sets:
            call(*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(every_set)
