"""The convolution ceiling: over shapes and layouts, one for all that is measured in a process."""

import pytest
import torch

from bench import Bench, Candidate, Cost, Workload, measure
from bench.measure import CONVOLUTIONS, convolution_cases, convolution_ceiling
from bench.timing import Time

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(CONVOLUTIONS, "cpu", ((2, 16, 8), (1, 32, 8)))
    measure._fastest_convolution.cache_clear()
    yield
    measure._fastest_convolution.cache_clear()


def test_every_layout_computes_the_convolution_that_is_counted(small):
    cases = {name: (flops, call()) for name, flops, call in convolution_cases(CPU)}
    layouts = ["", " channels_last", *([" packed"] if torch.backends.mkldnn.is_available() else [])]
    assert list(cases) == [f"[{s}] 3x3{layout}" for s in ("2, 16, 8, 8", "1, 32, 8, 8") for layout in layouts]
    for shape, flops in (("2, 16, 8, 8", 2 * 9 * 16 * 16 * 2 * 64), ("1, 32, 8, 8", 2 * 9 * 32 * 32 * 64)):
        plain = cases[f"[{shape}] 3x3"][1]
        for layout in layouts:
            counted, result = cases[f"[{shape}] 3x3{layout}"]
            assert counted == flops
            torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-3)


def test_the_fastest_case_is_the_ceiling_whatever_its_layout(small, monkeypatch):
    """With a made-up clock: seconds by case, in the order that they come in."""
    microseconds = {name: 100.0 for name, *_ in convolution_cases(CPU)}
    names = list(microseconds)
    calls = dict(zip(names, (lambda name=name: name for name in names), strict=True))
    flops = {name: amount for name, amount, _ in convolution_cases(CPU)}
    monkeypatch.setattr(measure, "convolution_cases", lambda device: [(n, flops[n], calls[n]) for n in names])

    def timer(call, sets, device, capturable=False):
        return lambda: Time(microseconds[call()], 0, 0)

    monkeypatch.setattr(measure, "timer", timer)
    for fastest in names:
        measure._fastest_convolution.cache_clear()
        microseconds |= dict.fromkeys(names, 100.0) | {fastest: 1.0}
        assert convolution_ceiling(CPU, rounds=2) == (flops[fastest] / 1e-6, fastest)


def test_it_is_a_rate_that_a_processor_can_have():
    # Two 512-bit FMA units at 5 GHz and 256 cores are 82 TFLOP/s; anything above a tenth of a GFLOP/s ran.
    assert 1e8 < convolution_ceiling(CPU, rounds=2).flops_per_s < 1e14


@pytest.mark.parametrize("name", ["copy", "yardstick", "eager"])
def test_a_candidate_does_not_get_the_times_of_what_else_is_timed(name):
    def build(device):
        candidate = Candidate(lambda: torch.neg, lambda call: 0.0, 1.0)
        return Bench([(torch.ones(3),)], torch.neg, {name: candidate}, Cost(24, 3))

    (record,) = measure.measure(Workload("w", "s", build), CPU, 1, 1.0, 1.0)
    assert f"candidates: got {name!r}" in record["failed"]
