"""What is counted of a call: operators, bytes wherever they are, graph breaks; and that counting leaves nothing on."""

import gc
import subprocess
import sys
import tracemalloc

import numpy
import pytest
import torch

from bench.counts import Compiled, compiled, counts, operators, torch_bytes
from bench.machine import ROOT

CPU = torch.device("cpu")
MIB = 2**20


def test_operators_are_those_that_one_call_dispatches():
    x = torch.ones(8)
    assert operators(lambda: x.sin().cos() + 1) == 3
    assert operators(lambda: None) == 0
    weight = torch.ones(4, 4, requires_grad=True)
    forward = operators(lambda: (weight @ weight).sum())
    assert operators(lambda: (weight @ weight).sum().backward()) > forward  # the backward ones too


def test_bytes_of_torch_are_all_and_the_most_at_once():
    def call():
        a = torch.empty(1000, 1000)
        b = a + 1
        del a
        c = torch.empty(1000, 1000)
        return b.sum() + c[0, 0]

    total, peak = torch_bytes(call, CPU)
    assert total == pytest.approx(12e6, rel=0.01)
    assert peak == pytest.approx(8e6, rel=0.01)
    assert torch_bytes(lambda: None, CPU) is None


@pytest.mark.parametrize(
    ("hold", "size"),
    [
        (lambda n: torch.ones(n * MIB, dtype=torch.uint8), 1.0),
        (lambda n: numpy.ones(n * MIB, dtype=numpy.uint8), 1.0),
        (lambda n: [None] * (n * MIB // 8), 1.0),
        (lambda n: bytearray(n * MIB), 1.0),
        (lambda n: torch.from_numpy(numpy.ones(n * MIB, dtype=numpy.uint8)), 1.0),
    ],
    ids=["torch", "numpy", "list", "bytes", "both"],
)
def test_twice_the_memory_is_twice_the_peak_whatever_holds_it(hold, size):
    one, two = (counts(lambda n=n: hold(n) is None, CPU)["counts"]["peak_bytes"] for n in (4, 8))
    assert one == pytest.approx(4 * MIB * size, rel=0.02)
    assert two == pytest.approx(8 * MIB * size, rel=0.02)


def test_counts_do_not_vary():
    x = torch.ones(300, 300)

    def call():
        cycle = [numpy.ones(10_000)]
        cycle.append(cycle)  # when the collector frees it must not matter
        return (x @ x).softmax(0).sum().item()

    found = [counts(call, CPU)["counts"] for _ in range(5)]
    for name in ("operators", "allocated_bytes"):
        assert len({one[name] for one in found}) == 1
    peaks = [one["peak_bytes"] for one in found]
    assert max(peaks) - min(peaks) < 4096


def test_counting_leaves_nothing_on_even_if_the_call_fails():
    def crash():
        raise RuntimeError("planted")

    for call in (crash, lambda: None):
        found = counts(call, CPU)
        assert not tracemalloc.is_tracing()
        assert gc.isenabled()
        assert torch._C._len_torch_dispatch_stack() == 0
    assert "uncounted" not in found
    found = counts(crash, CPU)
    assert found["counts"] == {}
    assert found["uncounted"] == dict.fromkeys(("operators", "allocated_bytes", "peak_bytes"), "RuntimeError: planted")


def test_graph_breaks_and_recompiles_are_those_since():
    def broken(x, power):
        y = x.sin() ** power
        torch._dynamo.graph_break()
        return y.cos()

    runs = []

    def backend(graph, examples):
        return lambda *inputs: runs.append(graph) or graph(*inputs)

    first = torch.compile(broken, backend=backend)
    before = compiled()
    first(torch.ones(4), 2)
    assert compiled().since(before) == {"graph_breaks": 1, "recompiles": 0}
    middle, ran = compiled(), len(runs)
    assert operators(lambda: first(torch.ones(4), 2)) == 4
    first(torch.ones(4), 2)
    assert len(runs) == 3 * ran  # compiled code runs while it is counted, and afterwards
    first(torch.ones(4), 3)
    assert compiled().since(middle)["recompiles"] >= 1
    assert Compiled(0, frozenset()).since(compiled())["graph_breaks"] == 0  # counters that were reset


def test_dynamo_is_not_loaded_to_ask():
    code = """import sys, torch
from bench.counts import compiled, counts
before = compiled()
counts(lambda: torch.ones(3) + 1, torch.device("cpu"))
assert compiled().since(before) == {"graph_breaks": 0, "recompiles": 0}
assert "torch._dynamo" not in sys.modules, "loaded"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
