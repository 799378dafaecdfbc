"""The suites `step` and `sampling`, without a compiler: what a call includes, and that a NaN never passes."""

import pytest
import torch

from bench.suites import cuda, networks, sampling, step
from ddpm import ContextUnet, PointMLP
from ddpm.inference import ContextUnetForm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_engines(monkeypatch):
    for suite in (step, sampling):
        monkeypatch.setattr(suite, "competitors", lambda device: ["fused"])


@pytest.fixture
def forms(monkeypatch):
    """The forms that are made."""
    made, own = [], ContextUnetForm.__init__

    def making(self, *arguments, **options):
        made.append(self)
        own(self, *arguments, **options)

    monkeypatch.setattr(ContextUnetForm, "__init__", making)
    return made


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_step_is_timed_with_its_engine_prepared(forms, guidance):
    bench = step._build(2, torch.float32, guidance, CPU)
    assert bench.calls == step.STEPS == 10
    candidate = bench.candidates["fused"]
    assert forms == []
    call = candidate.make()
    assert len(forms) == 1
    assert candidate.error(call) <= candidate.tolerance
    assert torch.equal(call(), call())
    assert len(forms) == 1
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    assert not candidate.error(lambda: call().index_fill(0, torch.tensor(1), torch.nan)) <= candidate.tolerance


def test_a_short_run_is_measured_whole(monkeypatch):
    for quick in (True, False):
        names = {workload.name: workload for workload in sampling.workloads(quick)}
        assert "sampling/short/ddim4/n1" in names
    seen = []
    own = sampling.sample

    def sample(*arguments, **options):
        seen.append((arguments[2], options))
        return own(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", sample)
    bench = names["sampling/short/ddim4/n1"].build(CPU)
    candidate = bench.candidates["fused"]
    assert candidate.error(candidate.make()) <= candidate.tolerance
    assert {n for n, _ in seen} == {1}
    assert {(options["solver"], options["steps"]) for _, options in seen} == {("ddim", 4)}
    assert [options["engine"] for _, options in seen] == ["fused", "eager"]


def test_the_cost_of_any_network_is_counted():
    points = PointMLP(2, 8)
    linear = sum(2 * module.weight.numel() for module in points.modules() if isinstance(module, torch.nn.Linear))
    assert networks.flops_of(points) == linear
    assert networks.flops_of(ContextUnet(1, 8, 0)) > 0  # without a condition
    assert networks.forward_flops() / 1e9 == pytest.approx(0.301, abs=0.002)


def test_the_time_of_the_step_that_users_compile_is_that_of_the_engines():
    row = cuda.Row("tiny", 1, steps=3)
    table, samples, context, _ = cuda._setting(row, CPU, 3)
    own = cuda.Step(row, table, torch.float32, samples, context, CPU)
    assert own.times.tolist() == (table.timesteps.double() / networks.TIMESTEPS).float().tolist()
