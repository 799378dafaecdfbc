"""The names that suites of others import."""

import pytest

import bench


def test_a_suite_finds_its_four_classes():
    from bench import Bench, Candidate, Cost, Workload, registry

    assert (Bench, Candidate, Workload) == (registry.Bench, registry.Candidate, registry.Workload)
    assert Cost(bytes=1, flops=2).bytes == 1
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bench.nothing
